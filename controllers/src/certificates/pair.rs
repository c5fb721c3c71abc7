//! Certificates with their keys: made, read and verified. Times are seconds since 1970.

use std::sync::Arc;
use std::time::Duration;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::End;

/// Clocks of nodes may be behind by so much, or a tenth of a short life.
const SKEW: Duration = Duration::from_secs(3600);

/// A certificate and its key, in PEM. More certificates may follow the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) certificate: String,
    pub(super) key: String,
}

/// From and until when a certificate holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Validity {
    pub(super) from: i64,
    pub(super) until: i64,
}

impl Validity {
    fn starting(now: i64, life: Duration) -> Self {
        let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX / 4);
        Self {
            from: now - seconds(SKEW.min(life / 10)),
            until: now + seconds(life),
        }
    }

    fn put(self, params: &mut CertificateParams) -> Result<(), String> {
        let time = |seconds| OffsetDateTime::from_unix_timestamp(seconds).map_err(told);
        params.not_before = time(self.from)?;
        params.not_after = time(self.until)?;
        Ok(())
    }
}

/// An error, and what lies behind it.
fn told(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(behind) = cause {
        text = format!("{text}: {behind}");
        cause = behind.source();
    }
    text
}

/// All certificates of a text in PEM; at least one.
pub(super) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| format!("no certificate in PEM ({error})"))?;
    if all.is_empty() {
        return Err("no certificate in PEM".to_owned());
    }
    Ok(all)
}

pub(super) fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .filter_map(|line| std::str::from_utf8(line).ok())
        .collect();
    format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        lines.join("\n")
    )
}

fn parsed<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    let (_, read) = X509Certificate::from_der(certificate)
        .map_err(|error| format!("unreadable certificate ({error})"))?;
    Ok(read)
}

pub(super) fn validity(certificate: &CertificateDer<'_>) -> Result<Validity, String> {
    let read = parsed(certificate)?;
    Ok(Validity {
        from: read.validity().not_before.timestamp(),
        until: read.validity().not_after.timestamp(),
    })
}

/// Between 0 and 1, always the same for a certificate: what is made at one time is not renewed at one time.
pub(super) fn share(certificate: &CertificateDer<'_>) -> f64 {
    let digest = Sha256::digest(certificate);
    let number = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    f64::from(number) / f64::from(u32::MAX)
}

impl Pair {
    /// A new authority.
    pub(super) fn authority(now: i64, life: Duration) -> Result<Self, String> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        // Each of them has a name of its own, so that an issuer names one.
        params
            .distinguished_name
            .push(DnType::CommonName, format!("cali-ca-{now}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Validity::starting(now, life).put(&mut params)?;
        let key = KeyPair::generate().map_err(told)?;
        let certificate = params.self_signed(&key).map_err(told)?;
        Ok(Self {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    /// A new certificate of an end, signed by this authority; it holds no longer than the authority.
    pub(super) fn issue(&self, end: End, now: i64, life: Duration) -> Result<Self, String> {
        let key = KeyPair::from_pem(&self.key).map_err(told)?;
        let own = self.end()?;
        let issuer = Issuer::from_ca_cert_der(&own, key).map_err(told)?;
        let name = end.common_name();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let host = Ia5String::try_from(name).map_err(told)?;
        params.subject_alt_names = vec![SanType::DnsName(host)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match end {
            End::Typha => ExtendedKeyUsagePurpose::ServerAuth,
            End::Node => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        let mut holds = Validity::starting(now, life);
        holds.until = holds.until.min(validity(&own)?.until);
        holds.put(&mut params)?;
        let key = KeyPair::generate().map_err(told)?;
        let certificate = params.signed_by(&key, &issuer).map_err(told)?;
        Ok(Self {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    /// The first certificate.
    pub(super) fn end(&self) -> Result<CertificateDer<'static>, String> {
        Ok(certificates(self.certificate.as_bytes())?.remove(0))
    }

    /// That key and certificate belong together.
    pub(super) fn check_key(&self) -> Result<(), String> {
        let chain = certificates(self.certificate.as_bytes())?;
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes())
            .map_err(|error| format!("no private key in PEM ({error})"))?;
        CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(told)?;
        Ok(())
    }

    /// That certificates can be signed with it.
    pub(super) fn check_authority(&self) -> Result<(), String> {
        self.check_key()?;
        let own = self.end()?;
        if !parsed(&own)?.is_ca() {
            return Err("the first certificate is none of an authority".to_owned());
        }
        let key = KeyPair::from_pem(&self.key).map_err(told)?;
        Issuer::from_ca_cert_der(&own, key).map_err(told)?;
        Ok(())
    }

    /// That the other end accepts this as the end's certificate if it trusts these authorities: by rustls' rules, as the daemons do.
    pub(super) fn check_end(
        &self,
        end: End,
        trusted: &[CertificateDer<'static>],
        now: i64,
    ) -> Result<(), String> {
        self.check_key()?;
        let chain = certificates(self.certificate.as_bytes())?;
        let (own, intermediate) = chain.split_first().ok_or("no certificate")?;
        let mut names = Vec::new();
        for name in parsed(own)?.subject().iter_common_name() {
            names.push(name.as_str().map_err(told)?.to_owned());
        }
        if !names.iter().any(|name| name == end.common_name()) {
            return Err(format!("its common name is {names:?}"));
        }
        let mut roots = RootCertStore::empty();
        for one in trusted {
            roots.add(one.clone()).map_err(told)?;
        }
        let roots = Arc::new(roots);
        let time = UnixTime::since_unix_epoch(Duration::from_secs(now.unsigned_abs()));
        let provider = Arc::new(ring::default_provider());
        match end {
            End::Typha => verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(own).map_err(told)?,
                &roots,
                intermediate,
                time,
                provider.signature_verification_algorithms.all,
            )
            .map_err(told),
            End::Node => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .build()
                    .map_err(told)?;
                let verified = verifier.verify_client_cert(own, intermediate, time);
                verified.map(drop).map_err(told)
            }
        }
    }
}
