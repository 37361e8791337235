//! What a type looks like when it is written without names, as a saved machine's state is: two programs understand each
//! other's state when this is equal for both. Nobody has to remember to count a version up.
//!
//! A type is walked by having it read from nothing: every number is 0, every sequence has one element, every option has
//! something, every enumeration is its first variant. Names, members and variants on the way make the fingerprint. What
//! variants but the first contain is not seen.

use serde::de::value::U32Deserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess,
    SeqAccess, VariantAccess, Visitor, value::Error,
};

/// Deeper types, such as one that contains itself, end here.
const MAX_DEPTH: usize = 64;

/// A fingerprint of how `T` is written.
pub fn fingerprint<T: DeserializeOwned>() -> u32 {
    crc32fast::hash(description::<T>().as_bytes())
}

fn description<T: DeserializeOwned>() -> String {
    let mut text = String::new();
    if let Err(error) = T::deserialize(Walk { text: &mut text, depth: 0 }) {
        // As far as it came: the same in every program that has this type.
        text += &error.to_string();
    }
    text
}

struct Walk<'a> {
    text: &'a mut String,
    depth: usize,
}

impl Walk<'_> {
    fn say(self, word: &str) -> Self {
        self.text.push_str(word);
        self.text.push(' ');
        self
    }

    /// For a part of it.
    fn part(&mut self) -> Result<Walk<'_>, Error> {
        if self.depth == MAX_DEPTH {
            return Err(Error::custom("too deep"));
        }
        Ok(Walk { text: self.text, depth: self.depth + 1 })
    }
}

/// Some elements, or members.
struct Parts<'a> {
    walk: Walk<'a>,
    left: usize,
}

macro_rules! numbers {
    ($($method:ident $visit:ident $value:expr;)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.say(stringify!($method));
            visitor.$visit($value)
        })*
    };
}

impl<'de> Deserializer<'de> for Walk<'_> {
    type Error = Error;

    numbers! {
        deserialize_bool visit_bool false;
        deserialize_i8 visit_i8 0;
        deserialize_i16 visit_i16 0;
        deserialize_i32 visit_i32 0;
        deserialize_i64 visit_i64 0;
        deserialize_i128 visit_i128 0;
        deserialize_u8 visit_u8 0;
        deserialize_u16 visit_u16 0;
        deserialize_u32 visit_u32 0;
        deserialize_u64 visit_u64 0;
        deserialize_u128 visit_u128 0;
        deserialize_f32 visit_f32 0.0;
        deserialize_f64 visit_f64 0.0;
        deserialize_char visit_char 'a';
        deserialize_str visit_str "";
        deserialize_string visit_str "";
        deserialize_bytes visit_bytes b"";
        deserialize_byte_buf visit_bytes b"";
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("a type that is not known before it is read"))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_any(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let mut walk = self.say("option");
        visitor.visit_some(walk.part()?)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.say("unit");
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.say(name).deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        let mut walk = self.say(name);
        visitor.visit_newtype_struct(walk.part()?)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Parts { walk: self.say("sequence"), left: 1 })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Parts { walk: self.say("tuple").say(&len.to_string()), left: len })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.say(name).deserialize_tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Parts { walk: self.say("map"), left: 1 })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let walk = fields.iter().fold(self.say(name), |walk, field| walk.say(field));
        visitor.visit_seq(Parts { walk, left: fields.len() })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(variants.iter().fold(self.say(name), |walk, variant| walk.say(variant)))
    }

    fn is_human_readable(&self) -> bool {
        false
    }
}

impl<'de> SeqAccess<'de> for Parts<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(self.walk.part()?).map(Some)
    }
}

impl<'de> MapAccess<'de> for Parts<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.next_element_seed(seed)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        seed.deserialize(self.walk.part()?)
    }
}

impl<'de> EnumAccess<'de> for Walk<'_> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let first: U32Deserializer<Error> = 0_u32.into_deserializer();
        Ok((seed.deserialize(first)?, self))
    }
}

impl<'de> VariantAccess<'de> for Walk<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(mut self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(self.part()?)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_struct("", fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    #![allow(dead_code, reason = "types that are looked at only")]

    use super::*;
    use crate::accounting::growth::{FreedBy, History};
    use crate::arch::CpuState;
    use crate::linux::{ModuleMap, Placement};
    use crate::registry::SavedRegistry;
    use serde::Deserialize;
    use std::collections::BTreeMap;
    use std::ops::Range;

    #[derive(Deserialize)]
    enum Kind {
        One(u8),
        Other { number: u64 },
    }

    #[derive(Deserialize)]
    struct Inner(i16);

    #[derive(Deserialize)]
    struct Whole {
        name: Option<String>,
        ranges: Vec<Range<u64>>,
        by_number: BTreeMap<u32, Inner>,
        kind: Kind,
        bytes: [u8; 2],
        nothing: (),
    }

    #[test]
    fn a_type_is_walked_to_its_ends() {
        let expected = "Whole name ranges by_number kind bytes nothing option deserialize_string \
                        sequence Range start end deserialize_u64 deserialize_u64 map deserialize_u32 Inner \
                        deserialize_i16 Kind One Other deserialize_u8 tuple 2 deserialize_u8 deserialize_u8 unit ";
        assert_eq!(description::<Whole>(), expected);
    }

    #[test]
    fn types_that_are_written_differently_differ() {
        #[derive(Deserialize)]
        struct Wide(i32);
        #[derive(Deserialize)]
        struct List {
            next: Option<Box<List>>,
        }
        assert_ne!(description::<(Inner, u8)>(), description::<(u8, Inner)>());
        assert_ne!(fingerprint::<Inner>(), fingerprint::<Wide>());
        assert!(description::<List>().ends_with("too deep"));
    }

    #[test]
    fn what_a_saved_machine_has_is_walked_to_its_ends() {
        type State = (SavedRegistry, ModuleMap, FreedBy, History, Vec<CpuState>, Placement);
        let text = description::<State>();
        for word in ["stacks", "sequence", "pid", "loaded", "regions", "symbols", "samples", "jiffies"] {
            assert!(text.split(' ').any(|w| w == word), "{word} in {text}");
        }
        assert!(text.ends_with(' '), "an error ends {text}");
    }
}
