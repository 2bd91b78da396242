//! The account at an authority: made once, kept, and found again at each start (RFC 8555 §7.3).

use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use instant_acme::{Account, AccountCredentials, ExternalAccountKey, NewAccount};
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::failure::{Failure, Step};
use super::storage::Storage;
use crate::config::tls::Acme;
use crate::error::chain;

/// What is kept. No `Debug`: the credentials hold the account's key.
#[derive(Deserialize, Serialize)]
struct Kept {
    /// The account is known there, and nowhere else.
    directory: String,
    contacts: Vec<String>,
    /// Id of the key that bound it.
    external_account: Option<String>,
    credentials: serde_json::Value,
}

/// Returns the account: the one that was kept, or a new one. With `is_lost` the authority does not know
/// the one that was kept.
pub(super) async fn open(
    acme: &Acme,
    storage: &Storage,
    client: &Client,
    is_lost: bool,
) -> Result<Account, Failure> {
    let Some(_lock) = storage.lock("account")? else {
        let reason = "another process that shares the storage makes the account";
        return Err(Failure::new(Step::Storage, reason));
    };
    if is_lost {
        tracing::warn!(
            directory = &*acme.directory,
            "the authority does not know the account that is kept: a new one is made"
        );
        storage.set_account_aside()?;
    }
    let kept = match kept(acme, storage) {
        Ok(kept) => kept,
        Err(error) => {
            tracing::warn!(error, "the account that is kept cannot be used: a new one is made");
            storage.set_account_aside()?;
            None
        }
    };
    match kept {
        Some((kept, credentials)) => restore(acme, storage, client, kept, credentials).await,
        None => create(acme, storage, client).await,
    }
}

/// Returns what was kept; `None` where there is nothing, or nothing for what is configured.
fn kept(acme: &Acme, storage: &Storage) -> Result<Option<(Kept, AccountCredentials)>, String> {
    let kept: Option<Kept> = storage.account().map_err(|error| chain(&error))?;
    let Some(kept) = kept else { return Ok(None) };
    if kept.directory != *acme.directory {
        return Err(format!("it is an account at {}", kept.directory));
    }
    let key_id = acme.external_account.as_ref().map(|(id, _)| &**id);
    if kept.external_account.as_deref() != key_id {
        return Err("it is bound to another external account".to_owned());
    }
    // The parser's own words could repeat a part of the key.
    let credentials = AccountCredentials::deserialize(&kept.credentials)
        .map_err(|_| "its credentials are damaged".to_owned())?;
    Ok(Some((kept, credentials)))
}

async fn restore(
    acme: &Acme,
    storage: &Storage,
    client: &Client,
    mut kept: Kept,
    credentials: AccountCredentials,
) -> Result<Account, Failure> {
    let failed = |error| Failure::of(Step::Account, &error);
    let builder = Account::builder_with_http(Box::new(client.clone()));
    let account = builder.from_credentials(credentials).await.map_err(failed)?;
    let contacts: Vec<&str> = acme.contacts.iter().map(|contact| &**contact).collect();
    if kept.contacts != contacts {
        account.update_contacts(&contacts).await.map_err(failed)?;
        kept.contacts = contacts.iter().map(ToString::to_string).collect();
        storage.keep_account(&kept)?;
        tracing::info!(account = account.id(), "contacts of the account changed");
    }
    Ok(account)
}

async fn create(acme: &Acme, storage: &Storage, client: &Client) -> Result<Account, Failure> {
    let external = match &acme.external_account {
        None => None,
        Some((id, key)) => {
            let key = decode(key.expose()).ok_or_else(|| {
                let reason = "the key of the external account is not base64url (accepted: as the authority shows it)";
                Failure { is_of_authority: true, ..Failure::new(Step::Account, reason) }
            })?;
            Some(ExternalAccountKey::new(id.to_string(), &key))
        }
    };
    let contacts: Vec<&str> = acme.contacts.iter().map(|contact| &**contact).collect();
    let wanted = NewAccount {
        contact: &contacts,
        terms_of_service_agreed: true,
        only_return_existing: false,
    };
    let builder = Account::builder_with_http(Box::new(client.clone()));
    let created = builder.create(&wanted, acme.directory.to_string(), external.as_ref()).await;
    let (account, credentials) = created.map_err(|error| Failure::of(Step::Account, &error))?;
    let credentials = serde_json::to_value(&credentials).map_err(|_| {
        Failure::new(Step::Account, "the account's credentials cannot be written down")
    })?;
    storage.keep_account(&Kept {
        directory: acme.directory.to_string(),
        contacts: contacts.iter().map(ToString::to_string).collect(),
        external_account: acme.external_account.as_ref().map(|(id, _)| id.to_string()),
        credentials,
    })?;
    tracing::info!(account = account.id(), "account made");
    Ok(account)
}

/// Reads an external account's key, padded or not.
fn decode(key: &str) -> Option<Vec<u8>> {
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    GeneralPurpose::new(&URL_SAFE, config).decode(key.trim()).ok().filter(|key| !key.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_keys_are_base64url_padded_or_not() {
        for (text, expected) in [
            ("-_8", Some(vec![0xfb, 0xff])),
            ("-_8=\n", Some(vec![0xfb, 0xff])),
            ("", None),
            ("+/8", None),
            ("no key", None),
        ] {
            assert_eq!(decode(text), expected, "{text:?}");
        }
    }
}
