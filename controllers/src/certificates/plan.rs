//! What has to be done next, from what the Secrets hold and the time.

use std::time::Duration;

use cali_datastore::{Secret, SecretObject};
use rustls::pki_types::CertificateDer;

use super::pair::{Pair, certificates, pem, share, validity};
use super::{
    AUTHORITY, CERTIFICATE, DIGEST, End, KEY, Lifetimes, NEXT, Owner, PREVIOUS, State, TRUSTED,
    WRITTEN, digest, owner,
};

/// One write of one Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A first authority, or one in place of what has been lost or has expired.
    Make,
    /// A successor, which is trusted from now on and signs nothing yet.
    Introduce,
    /// The successor signs from now on.
    Promote,
    /// The former authorities are trusted no longer.
    Drop,
    /// A new certificate.
    Issue(End),
    /// The certificate stays; who is trusted changes.
    Trust(End),
}

/// What to do, and what people should know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// At most one step: what follows is decided on what it leaves.
    pub step: Option<Step>,
    /// What is not looked after, and why.
    pub notes: Vec<String>,
}

/// The authority's Secret, read.
struct Authority {
    current: Pair,
    next: Option<Pair>,
    previous: Vec<CertificateDer<'static>>,
    /// It signs, and is never changed.
    brought: bool,
}

impl Authority {
    fn read(secret: &SecretObject) -> Result<Self, String> {
        let brought = owner(secret) == Owner::User;
        let current = pair(&secret.data, (CERTIFICATE, KEY))?
            .ok_or_else(|| format!("{CERTIFICATE} and {KEY} are needed"))?;
        current.check_authority()?;
        // A user's Secret may hold further authorities that are to be trusted.
        let mut previous = Vec::new();
        if brought {
            previous.extend(certificates(current.certificate.as_bytes())?.split_off(1));
        }
        let also = if brought { TRUSTED } else { PREVIOUS };
        if let Some(text) = secret.data.get(also).filter(|text| !text.is_empty()) {
            previous.extend(certificates(text)?);
        }
        let next = if brought {
            None
        } else {
            pair(&secret.data, NEXT)?
        };
        if let Some(next) = &next {
            next.check_authority()?;
        }
        Ok(Self {
            current,
            next,
            previous,
            brought,
        })
    }

    /// Every authority that is to be trusted, the one that signs first.
    fn trusted(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        let mut all = vec![self.current.end()?];
        if let Some(next) = &self.next {
            all.push(next.end()?);
        }
        for one in &self.previous {
            if !all.contains(one) {
                all.push(one.clone());
            }
        }
        Ok(all)
    }

    fn bundle(&self) -> Result<Vec<u8>, String> {
        let all = self.trusted()?;
        Ok(all.iter().map(pem).collect::<String>().into_bytes())
    }
}

fn pair(data: &Secret, (certificate, key): (&str, &str)) -> Result<Option<Pair>, String> {
    let text = |name: &str| {
        let value = data.get(name).filter(|value| !value.is_empty());
        value
            .map(|value| String::from_utf8(value.clone()).map_err(|_| format!("{name} is no text")))
            .transpose()
    };
    Ok(match (text(certificate)?, text(key)?) {
        (Some(certificate), Some(key)) => Some(Pair { certificate, key }),
        (None, None) => None,
        _ => return Err(format!("of {certificate} and {key} one is missing")),
    })
}

/// Whether it is time to renew: after two thirds of its life, or up to a tenth of it earlier.
fn is_due(certificate: &CertificateDer<'_>, now: i64) -> Result<bool, String> {
    let holds = validity(certificate)?;
    let life = holds.until - holds.from;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "seconds of a life, to a tenth"
    )]
    let early = (life as f64 / 10.0 * share(certificate)) as i64;
    Ok(now >= holds.from + life * 2 / 3 - early)
}

/// Whether what was written has reached everybody. A clock that was set back must not hold it up for ever.
fn is_settled(secret: &SecretObject, settle: Duration, now: i64) -> bool {
    let written = secret.annotations.get(WRITTEN);
    let written = written.and_then(|text| text.parse::<i64>().ok());
    written.is_some_and(|at| now.abs_diff(at) >= settle.as_secs())
}

/// Decides. `now` is in seconds since 1970.
#[must_use]
pub fn decide(state: &State, lifetimes: &Lifetimes, now: i64) -> Decision {
    let mut notes = Vec::new();
    let step = next_step(state, lifetimes, now, &mut notes).unwrap_or_else(|note| {
        notes.push(note);
        None
    });
    Decision { step, notes }
}

fn next_step(
    state: &State,
    lifetimes: &Lifetimes,
    now: i64,
    notes: &mut Vec<String>,
) -> Result<Option<Step>, String> {
    let mut ends = Vec::new();
    let mut brought = Vec::new();
    for end in End::ALL {
        let secret = state.of(end).ok_or_else(|| missing(end.secret()))?;
        if owner(secret) == Owner::User {
            notes.push(of_user(end, secret, now));
            brought.push(end);
        }
        ends.push((end, secret));
    }
    if !brought.is_empty() {
        if brought.len() < ends.len() {
            notes.push(format!(
                "only one of {} and {} was brought: each end must trust the other's authority, so bring both, or empty that one",
                End::Typha.secret(),
                End::Node.secret()
            ));
        }
        return Ok(None);
    }
    let secret = state.authority.as_ref().ok_or_else(|| missing(AUTHORITY))?;
    let authority = match (owner(secret), Authority::read(secret)) {
        (Owner::Nobody, _) => return Ok(Some(Step::Make)),
        (Owner::Us, Err(_)) => return Ok(Some(Step::Make)),
        (Owner::User, Err(reason)) => {
            return Err(format!(
                "the authority that was brought in Secret {AUTHORITY} cannot be used: {reason}"
            ));
        }
        (_, Ok(authority)) => authority,
    };
    let current = authority.current.end()?;
    let holds = validity(&current)?;
    if authority.brought {
        if is_due(&current, now)? {
            notes.push(format!(
                "the authority that was brought in Secret {AUTHORITY} ends {}: bring its successor as the first certificate of {CERTIFICATE}, \
                 and leave this one after it until nothing of it is in use",
                date(holds.until)
            ));
        }
        if now >= holds.until {
            return Ok(None);
        }
    } else {
        match &authority.next {
            Some(_) if now >= holds.until => return Ok(Some(Step::Promote)),
            None if now >= holds.until => return Ok(Some(Step::Make)),
            None if is_due(&current, now)? => return Ok(Some(Step::Introduce)),
            _ => {}
        }
    }
    let bundle = authority.bundle()?;
    for (end, secret) in &ends {
        if let Some(step) = for_end(*end, secret, &current, &bundle, now)? {
            return Ok(Some(step));
        }
    }
    let settled = ends
        .iter()
        .all(|(_, secret)| is_settled(secret, lifetimes.settle, now));
    if authority.brought || !settled {
        return Ok(None);
    }
    Ok(match (&authority.next, authority.previous.is_empty()) {
        (_, false) => Some(Step::Drop),
        (Some(_), true) => Some(Step::Promote),
        (None, true) => None,
    })
}

/// What an end's Secret lacks.
fn for_end(
    end: End,
    secret: &SecretObject,
    current: &CertificateDer<'static>,
    bundle: &[u8],
    now: i64,
) -> Result<Option<Step>, String> {
    let Ok(Some(own)) = pair(&secret.data, (CERTIFICATE, KEY)) else {
        return Ok(Some(Step::Issue(end)));
    };
    let signed = std::slice::from_ref(current);
    if own.check_end(end, signed, now).is_err() {
        return Ok(Some(Step::Issue(end)));
    }
    let certificate = own.end()?;
    // One that ends with its authority gains nothing by another of the same authority.
    let gains = validity(&certificate)?.until < validity(current)?.until;
    if gains && is_due(&certificate, now)? {
        return Ok(Some(Step::Issue(end)));
    }
    let trusts = secret.data.get(TRUSTED).map(Vec::as_slice);
    Ok((trusts != Some(bundle)).then_some(Step::Trust(end)))
}

fn missing(name: &str) -> String {
    format!("Secret {name} is not there: apply the manifests again, which lay it down empty")
}

fn of_user(end: End, secret: &SecretObject, now: i64) -> String {
    let name = end.secret();
    let own = secret.data.get(CERTIFICATE).map(Vec::as_slice);
    let ends = certificates(own.unwrap_or_default())
        .and_then(|all| Ok((is_due(&all[0], now)?, validity(&all[0])?.until)));
    match ends {
        Ok((true, until)) => format!(
            "the certificate that was brought in Secret {name} ends {}: renew it where it was made",
            date(until)
        ),
        Ok((false, _)) => {
            format!("Secret {name} holds a certificate that was brought: it is left as it is")
        }
        Err(reason) => format!(
            "Secret {name} holds something that was brought and is left as it is: {CERTIFICATE}: {reason}"
        ),
    }
}

fn date(seconds: i64) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp(seconds);
    time.map_or_else(|_| seconds.to_string(), |time| time.date().to_string())
}

/// Name of the Secret that a step writes.
#[must_use]
pub const fn secret_of(step: Step) -> &'static str {
    match step {
        Step::Make | Step::Introduce | Step::Promote | Step::Drop => AUTHORITY,
        Step::Issue(end) | Step::Trust(end) => end.secret(),
    }
}

/// What a step makes of its Secret; keys are random.
///
/// # Errors
/// Why it cannot be made.
pub fn carry_out(
    step: Step,
    state: &State,
    lifetimes: &Lifetimes,
    now: i64,
) -> Result<SecretObject, String> {
    let secret = match step {
        Step::Issue(end) | Step::Trust(end) => state.of(end),
        _ => state.authority.as_ref(),
    };
    let secret = secret.ok_or_else(|| missing(secret_of(step)))?;
    let authority = || {
        let secret = state.authority.as_ref().ok_or_else(|| missing(AUTHORITY))?;
        Authority::read(secret)
    };
    let data = match step {
        Step::Make => with_previous(
            (CERTIFICATE, KEY),
            &Pair::authority(now, lifetimes.authority)?,
            &trusted_by_ends(state),
        ),
        Step::Introduce => {
            let mut data = secret.data.clone();
            let next = Pair::authority(now, lifetimes.authority)?;
            data.insert(NEXT.0.to_owned(), next.certificate.into_bytes());
            data.insert(NEXT.1.to_owned(), next.key.into_bytes());
            data
        }
        Step::Promote => {
            let authority = authority()?;
            let next = authority.next.as_ref().ok_or("there is no successor")?;
            let mut previous = vec![authority.current.end()?];
            previous.extend(authority.previous.iter().cloned());
            with_previous((CERTIFICATE, KEY), next, &previous)
        }
        Step::Drop => {
            let mut data = secret.data.clone();
            data.remove(PREVIOUS);
            data
        }
        Step::Issue(end) => {
            let authority = authority()?;
            let new = authority.current.issue(end, now, lifetimes.certificate)?;
            let mut data = with_previous((CERTIFICATE, KEY), &new, &[]);
            data.insert(TRUSTED.to_owned(), authority.bundle()?);
            data
        }
        Step::Trust(_) => {
            let mut data = secret.data.clone();
            data.insert(TRUSTED.to_owned(), authority()?.bundle()?);
            data
        }
    };
    let mut annotations = secret.annotations.clone();
    annotations.insert(DIGEST.to_owned(), digest(&data));
    annotations.insert(WRITTEN.to_owned(), now.to_string());
    Ok(SecretObject {
        data,
        annotations,
        revision: secret.revision.clone(),
    })
}

fn with_previous(
    (certificate, key): (&str, &str),
    pair: &Pair,
    previous: &[CertificateDer<'static>],
) -> Secret {
    let mut data = Secret::from([
        (
            certificate.to_owned(),
            pair.certificate.clone().into_bytes(),
        ),
        (key.to_owned(), pair.key.clone().into_bytes()),
    ]);
    if !previous.is_empty() {
        let text: String = previous.iter().map(pem).collect();
        data.insert(PREVIOUS.to_owned(), text.into_bytes());
    }
    data
}

/// Authorities that the ends trust by what we wrote: a new authority in place of a lost one lets those go on that still use it.
fn trusted_by_ends(state: &State) -> Vec<CertificateDer<'static>> {
    let mut all: Vec<CertificateDer<'static>> = Vec::new();
    for secret in End::ALL.into_iter().filter_map(|end| state.of(end)) {
        if owner(secret) != Owner::Us {
            continue;
        }
        let text = secret.data.get(TRUSTED).map(Vec::as_slice);
        for one in certificates(text.unwrap_or_default()).unwrap_or_default() {
            if !all.contains(&one) {
                all.push(one);
            }
        }
    }
    all
}
