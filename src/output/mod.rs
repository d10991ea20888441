//! From typed answers to text for a person.

pub mod text;
