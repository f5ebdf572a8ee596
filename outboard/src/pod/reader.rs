//! Reading TOML by hand, so that every mistake of a file is found at once.
//!
//! `serde` stops at the first mistake. Here each key is asked for by name, a bad one leaves a mistake
//! with its place and counts as absent, and what nobody asked for is an unknown key.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;

use outboard_common::config_file::ConfigFile;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A value and where it was written, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) span: Range<usize>,
}

/// What is wrong with a file, collected while it is read.
#[derive(Debug, Default)]
pub(super) struct Mistakes(RefCell<Vec<(Range<usize>, String)>>);

impl Mistakes {
    /// Notes a mistake: what, and what to do.
    pub(super) fn add(&self, span: &Range<usize>, message: impl Into<String>) {
        self.0.borrow_mut().push((span.clone(), message.into()));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// One line a mistake, `file:line:column: message`, in the order of the file.
    pub(super) fn lines(self, file: &ConfigFile) -> Vec<String> {
        let mut list = self.0.into_inner();
        list.sort_by_key(|(span, _)| span.start);
        list.dedup();
        list.into_iter().map(|(span, message)| file.error_at(span, &message).to_string()).collect()
    }
}

/// A table of the file while it is read.
pub(super) struct Section<'t> {
    /// Where it begins.
    pub(super) span: Range<usize>,
    table: &'t DeTable<'t>,
    asked: RefCell<BTreeSet<&'static str>>,
    mistakes: &'t Mistakes,
}

impl<'t> Section<'t> {
    pub(super) fn new(
        table: &'t DeTable<'t>,
        span: Range<usize>,
        mistakes: &'t Mistakes,
    ) -> Section<'t> {
        Section { span, table, asked: RefCell::default(), mistakes }
    }

    /// Where `key` is written, or where the table is.
    pub(super) fn place(&self, key: &str) -> Range<usize> {
        let found = self.table.iter().find(|(name, _)| name.get_ref().as_ref() == key);
        found.map_or_else(|| self.span.clone(), |(name, _)| name.span())
    }

    /// Whether `key` is there, right or wrong.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.get(key).is_some()
    }

    fn get(&self, key: &'static str) -> Option<&'t Spanned<DeValue<'t>>> {
        self.asked.borrow_mut().insert(key);
        self.table.get(key)
    }

    fn wrong_kind<T>(&self, value: &Spanned<DeValue<'_>>, key: &str, wanted: &str) -> Option<T> {
        let found = value.get_ref().type_str();
        self.mistakes.add(&value.span(), format!("`{key}` is a {found}; write {wanted}"));
        None
    }

    /// A text.
    pub(super) fn text(&self, key: &'static str) -> Option<At<String>> {
        let value = self.get(key)?;
        match value.get_ref().as_str() {
            Some(text) => Some(At { value: text.to_owned(), span: value.span() }),
            None => self.wrong_kind(value, key, "a text in quotes"),
        }
    }

    /// True or false; absent is false.
    pub(super) fn flag(&self, key: &'static str) -> bool {
        let Some(value) = self.get(key) else { return false };
        match value.get_ref().as_bool() {
            Some(flag) => flag,
            None => self.wrong_kind(value, key, "true or false").unwrap_or_default(),
        }
    }

    /// A text or a number, made into a value by `parse`, whose error says what to do.
    pub(super) fn parsed<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<At<T>> {
        let value = self.get(key)?;
        let text = match value.get_ref() {
            DeValue::String(text) => text.to_string(),
            DeValue::Integer(number) if number.radix() == 10 => number.as_str().to_owned(),
            _ => return self.wrong_kind(value, key, "a number, or a text in quotes"),
        };
        match parse(&text) {
            Ok(parsed) => Some(At { value: parsed, span: value.span() }),
            Err(why) => {
                self.mistakes.add(&value.span(), format!("`{key}` = {text}: {why}"));
                None
            }
        }
    }

    /// Texts, each made into a value by `parse`, whose error says what to do; absent is none.
    pub(super) fn list<T>(
        &self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let wanted = "texts in brackets: [\"...\"]";
        let Some(array) = value.get_ref().as_array() else {
            return self.wrong_kind(value, key, wanted).unwrap_or_default();
        };
        let one = |item: &Spanned<DeValue<'_>>| {
            let Some(text) = item.get_ref().as_str() else {
                return self.wrong_kind(item, key, wanted);
            };
            parse(text)
                .map_err(|why| self.mistakes.add(&item.span(), format!("`{key}` = {text}: {why}")))
                .ok()
        };
        array.iter().filter_map(one).collect()
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&self, key: &'static str, words: &[(&str, T)]) -> Option<At<T>> {
        let text = self.text(key)?;
        let found = words.iter().find(|(word, _)| *word == text.value);
        let Some((_, value)) = found else {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            let (found, known) = (text.value, known.join(", "));
            self.mistakes.add(&text.span, format!("`{key}` = {found:?}; write one of {known}"));
            return None;
        };
        Some(At { value: *value, span: text.span })
    }

    /// What must be there.
    pub(super) fn required<T>(&self, key: &'static str, value: Option<T>, hint: &str) -> Option<T> {
        // A value that is there and wrong has its mistake already.
        if self.table.get(key).is_none() {
            self.mistakes.add(&self.span, format!("`{key}` is missing; {hint}"));
        }
        value
    }

    /// The table `key`.
    pub(super) fn section(&self, key: &'static str) -> Option<Section<'t>> {
        let value = self.get(key)?;
        match value.get_ref().as_table() {
            Some(table) => Some(Section::new(table, value.span(), self.mistakes)),
            None => self.wrong_kind(value, key, &format!("a table: [{key}]")),
        }
    }

    /// The tables of the array `key`.
    pub(super) fn sections(&self, key: &'static str) -> Vec<Section<'t>> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let wanted = format!("tables: [[{key}]]");
        let Some(array) = value.get_ref().as_array() else {
            return self.wrong_kind(value, key, &wanted).unwrap_or_default();
        };
        let one = |item: &'t Spanned<DeValue<'t>>| match item.get_ref().as_table() {
            Some(table) => Some(Section::new(table, item.span(), self.mistakes)),
            None => self.wrong_kind(item, key, &wanted),
        };
        array.iter().filter_map(one).collect()
    }

    /// Every key that was not asked for is a mistake. `what` names this table.
    pub(super) fn finish(self, what: &str) {
        let asked = self.asked.into_inner();
        for (key, _) in self.table {
            let name: &str = key.get_ref().as_ref();
            if !asked.contains(name) {
                let known = asked.iter().copied().collect::<Vec<_>>().join(", ");
                let message = format!("unknown key `{name}`; {what} has {known}");
                self.mistakes.add(&key.span(), message);
            }
        }
    }
}
