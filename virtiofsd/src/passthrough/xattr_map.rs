//! The rules that rename or hide extended attributes between guest and host (`--xattrmap`).
//!
//! A rule is `:type:scope:key:prepend:`, its separator the first character that is not white space.
//! The first rule that matches decides; the list must end in rules that match every name, or names
//! that nothing matches are refused.

use std::ffi::{CStr, CString};

/// Why a list of rules could not be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum XattrMapError {
    /// No rule at all.
    #[error("the mapping has no rule")]
    Empty,
    /// A rule ends before its last separator.
    #[error("rule {0} is not complete: expected ':type:scope:key:prepend:' or ':map:key:prepend:'")]
    Incomplete(usize),
    /// The first word of a rule.
    #[error(
        "rule {rule} has the unknown type '{word}': expected prefix, ok, bad, unsupported or map"
    )]
    UnknownType {
        /// Number of the rule, from 1.
        rule: usize,
        /// The word found.
        word: String,
    },
    /// The second word of a rule.
    #[error("rule {rule} has the unknown scope '{word}': expected client, server or all")]
    UnknownScope {
        /// Number of the rule, from 1.
        rule: usize,
        /// The word found.
        word: String,
    },
    /// `map` stands for a whole list and must come last.
    #[error("rule {0} follows 'map', which must be the last rule")]
    AfterMap(usize),
    /// No attribute name can hold one.
    #[error("rule {0} holds a zero byte")]
    ZeroByte(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Prefix,
    Ok,
    Bad,
    Unsupported,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    action: Action,
    client: bool,
    server: bool,
    key: String,
    prepend: String,
}

/// What the rules make of a name that the guest uses.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientName<'a> {
    /// Use the guest's name.
    Same(&'a CStr),
    /// Use this one.
    Renamed(CString),
}

impl ClientName<'_> {
    /// The name on the host.
    #[must_use]
    pub fn as_c_str(&self) -> &CStr {
        match self {
            ClientName::Same(name) => name,
            ClientName::Renamed(name) => name,
        }
    }
}

/// A parsed `--xattrmap`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XattrMap {
    rules: Vec<Rule>,
}

impl XattrMap {
    /// Parses a list of rules.
    ///
    /// # Errors
    /// Says which rule is wrong.
    pub fn parse(text: &str) -> Result<Self, XattrMapError> {
        let mut rules = Vec::new();
        let mut rest = text.trim_start();
        let mut number = 0;
        let mut mapped = false;
        while let Some(separator) = rest.chars().next() {
            number += 1;
            if mapped {
                return Err(XattrMapError::AfterMap(number));
            }
            let body = rest.get(separator.len_utf8()..).unwrap_or("");
            let mut fields = Fields { rest: body, separator, rule: number };
            let word = fields.next()?;
            if word == "map" {
                let (key, prepend) = (fields.next()?, fields.next()?);
                mapped = true;
                push_map(&mut rules, key, prepend);
            } else {
                rules.push(fields.rule(word)?);
            }
            rest = fields.rest.trim_start();
        }
        if rules.is_empty() { Err(XattrMapError::Empty) } else { Ok(Self { rules }) }
    }

    /// The host's name for a name that the guest uses.
    ///
    /// # Errors
    /// `EPERM` for a name ruled bad or matched by no rule, `ENOTSUP` for an unsupported one.
    pub fn client<'a>(&self, name: &'a CStr) -> Result<ClientName<'a>, i32> {
        let bytes = name.to_bytes();
        let rule = self
            .rules
            .iter()
            .find(|rule| rule.client && bytes.starts_with(rule.key.as_bytes()))
            .ok_or(libc::EPERM)?;
        match rule.action {
            Action::Ok => Ok(ClientName::Same(name)),
            Action::Bad => Err(libc::EPERM),
            Action::Unsupported => Err(libc::ENOTSUP),
            Action::Prefix => {
                let mut renamed = Vec::with_capacity(rule.prepend.len() + bytes.len());
                renamed.extend_from_slice(rule.prepend.as_bytes());
                renamed.extend_from_slice(bytes);
                CString::new(renamed).map(ClientName::Renamed).map_err(|_unfit| libc::EINVAL)
            }
        }
    }

    /// The guest's name for a name found on the host; `None` if the guest shall not see it.
    #[must_use]
    pub fn server<'a>(&self, name: &'a [u8]) -> Option<&'a [u8]> {
        let rule = self
            .rules
            .iter()
            .find(|rule| rule.server && name.starts_with(rule.prepend.as_bytes()))?;
        match rule.action {
            Action::Ok => Some(name),
            Action::Bad | Action::Unsupported => None,
            Action::Prefix => name.get(rule.prepend.len()..),
        }
    }

    /// Whether the host keeps `name` under another name.
    #[must_use]
    pub fn renames(&self, name: &CStr) -> bool {
        matches!(self.client(name), Ok(ClientName::Renamed(_)))
    }
}

/// The fields of one rule.
struct Fields<'a> {
    rest: &'a str,
    separator: char,
    rule: usize,
}

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<&'a str, XattrMapError> {
        let (field, rest) =
            self.rest.split_once(self.separator).ok_or(XattrMapError::Incomplete(self.rule))?;
        if field.contains('\0') {
            return Err(XattrMapError::ZeroByte(self.rule));
        }
        self.rest = rest;
        Ok(field)
    }

    /// The rest of a rule of type `word`.
    fn rule(&mut self, word: &str) -> Result<Rule, XattrMapError> {
        let action = match word {
            "prefix" => Action::Prefix,
            "ok" => Action::Ok,
            "bad" => Action::Bad,
            "unsupported" => Action::Unsupported,
            _ => return Err(XattrMapError::UnknownType { rule: self.rule, word: word.to_owned() }),
        };
        let (client, server) = match self.next()? {
            "client" => (true, false),
            "server" => (false, true),
            "all" => (true, true),
            other => {
                return Err(XattrMapError::UnknownScope {
                    rule: self.rule,
                    word: other.to_owned(),
                });
            }
        };
        let key = self.next()?.to_owned();
        let prepend = self.next()?.to_owned();
        Ok(Rule { action, client, server, key, prepend })
    }
}

/// What `:map:key:prepend:` stands for: rename the key's names, keep the guest from the names they
/// get and from the host's own of that key, and, when only some names are renamed, let others pass.
fn push_map(rules: &mut Vec<Rule>, key: &str, prepend: &str) {
    let mut push = |action, (client, server), key: &str, prepend: &str| {
        rules.push(Rule {
            action,
            client,
            server,
            key: key.to_owned(),
            prepend: prepend.to_owned(),
        });
    };
    push(Action::Prefix, (true, true), key, prepend);
    if key.is_empty() {
        push(Action::Bad, (true, true), "", "");
    } else {
        push(Action::Bad, (false, true), "", key);
        push(Action::Bad, (true, false), prepend, "");
        push(Action::Ok, (true, true), "", "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_host(map: &str, name: &CStr) -> Result<String, i32> {
        let map = XattrMap::parse(map).unwrap();
        map.client(name).map(|name| name.as_c_str().to_string_lossy().into_owned())
    }

    #[test]
    fn map_renames_everything_when_the_key_is_empty() {
        for text in [":map::user.virtiofs.:", ":prefix:all::user.virtiofs.::bad:all:::"] {
            assert_eq!(to_host(text, c"trusted.x").unwrap(), "user.virtiofs.trusted.x");
            let map = XattrMap::parse(text).unwrap();
            assert_eq!(map.server(b"user.virtiofs.trusted.x"), Some(&b"trusted.x"[..]));
            assert_eq!(map.server(b"user.other"), None);
        }
    }

    #[test]
    fn map_of_one_key_guards_both_ends_and_lets_others_pass() {
        let spelled = "/prefix/all/trusted./user.virtiofs./\n  /bad/server//trusted./\n
            /bad/client/user.virtiofs.//  /ok/all///";
        for text in ["/map/trusted./user.virtiofs./", spelled] {
            assert_eq!(to_host(text, c"trusted.x").unwrap(), "user.virtiofs.trusted.x");
            assert_eq!(to_host(text, c"user.virtiofs.trusted.x"), Err(libc::EPERM));
            assert_eq!(to_host(text, c"user.plain").unwrap(), "user.plain");
            let map = XattrMap::parse(text).unwrap();
            assert_eq!(map.server(b"trusted.secret"), None);
            assert_eq!(map.server(b"user.plain"), Some(&b"user.plain"[..]));
        }
        assert_eq!(XattrMap::parse("/map/trusted./user.virtiofs./"), XattrMap::parse(spelled));
    }

    #[test]
    fn refusals_have_their_errno_and_unmatched_names_are_refused() {
        let map = ":unsupported:client:security.:::bad:client:trusted.:::ok:all:user.:user.:";
        assert_eq!(to_host(map, c"security.selinux"), Err(libc::ENOTSUP));
        assert_eq!(to_host(map, c"trusted.overlay"), Err(libc::EPERM));
        assert_eq!(to_host(map, c"system.nfs4_acl"), Err(libc::EPERM));
        assert_eq!(XattrMap::parse(map).unwrap().server(b"system.nfs4_acl"), None);
    }

    #[test]
    fn wrong_rules_are_named() {
        assert_eq!(XattrMap::parse("  "), Err(XattrMapError::Empty));
        assert_eq!(XattrMap::parse(":ok:all::"), Err(XattrMapError::Incomplete(1)));
        assert_eq!(XattrMap::parse(":ok:all::: :ok"), Err(XattrMapError::Incomplete(2)));
        assert!(matches!(
            XattrMap::parse(":k:all:::"),
            Err(XattrMapError::UnknownType { rule: 1, .. })
        ));
        assert!(matches!(XattrMap::parse(":ok:a:::"), Err(XattrMapError::UnknownScope { .. })));
        assert_eq!(XattrMap::parse(":map::u.: :ok:all:::"), Err(XattrMapError::AfterMap(2)));
        assert_eq!(XattrMap::parse(":ok:all:a\0::"), Err(XattrMapError::ZeroByte(1)));
    }
}
