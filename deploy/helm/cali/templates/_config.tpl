{{- /* The settings: cali.env, and over it what the values say. */ -}}
{{- define "cali.config" -}}
{{- $config := dict -}}
{{- range $line := splitList "\n" (.Files.Get "files/base/cali.env") -}}
{{- if and (contains "=" $line) (not (hasPrefix "#" $line)) -}}
{{- $parts := regexSplit "=" $line 2 -}}
{{- $_ := set $config (index $parts 0) (index $parts 1) -}}
{{- end -}}
{{- end -}}
{{- if .Values.iptables.enabled -}}
{{- $_ := set $config "FELIX_NFTABLESMODE" "Disabled" -}}
{{- end -}}
{{- range $name, $value := .Values.config -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $config $name -}}
{{- else -}}
{{- $_ := set $config $name (toString (kindIs "float64" $value | ternary (int64 $value) $value)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}
