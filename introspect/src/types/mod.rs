//! BTF: layouts of the kernel's structures, looked up by member name
//! (Documentation/bpf/btf.rst).
//!
//! [`raw`] reads the records; this file follows them. The image is untrusted: chains of typedefs are cut after
//! [`MAX_CHAIN`] steps, and a search through anonymous members ends after [`MAX_VISITS`].

mod pointers;
mod raw;
#[cfg(test)]
#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "most of it is for tests on x86-64 kernels"))]
pub(crate) mod synthetic;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

use crate::image::{KernelImage, find_all};
use anyhow::{Context, bail};
use hashbrown::HashTable;
pub use raw::{Kind, TypeId};
use raw::{MAGIC, Raw, Record};
use rustc_hash::FxBuildHasher;
use std::hash::BuildHasher;

/// Longest chain of typedefs, qualifiers and nested arrays that is followed; as MAX_RESOLVE_DEPTH of
/// kernel/bpf/btf.c, doubled.
const MAX_CHAIN: usize = 64;
/// Deepest nesting of anonymous members that is searched.
const MAX_NESTING: u32 = 32;
/// Members looked at for one question. The largest structure of a distribution kernel has about a thousand.
const MAX_VISITS: u32 = 1 << 17;
/// Fewest types of a BTF found by its magic alone.
const MIN_TYPES: usize = 1000;
/// Section that describes per-CPU variables.
const PERCPU_SECTION: &str = ".data..percpu";
/// Size of a pointer in guest memory, bytes.
const POINTER_BYTES: u64 = 8;

/// A structure member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Offset in bytes from the start of the outermost structure.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
    /// Bit offset inside the byte at `offset`, and width; width 0 when not a bit field.
    pub bits: (u8, u8),
}

/// A member as [`Btf::members`] lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member<'a> {
    /// Name.
    pub name: &'a str,
    /// Place in the structure listed.
    pub field: Field,
    /// What it is, behind typedefs and qualifiers.
    pub kind: Kind,
    /// Its type behind typedefs and qualifiers: for [`Btf::members_of`] and [`Btf::elements_of`].
    pub ty: TypeId,
    /// Type as C writes it, without qualifiers: `struct list_head`, `gfp_t`, `void *[4]`.
    pub type_name: String,
}

/// The kernel's BTF.
pub struct Btf {
    raw: Raw,
    /// Named structs, unions, typedefs and functions: the first of each kind and name.
    by_name: HashTable<TypeId>,
}

impl Btf {
    /// Finds and parses the image's BTF: the section `.BTF`, else the largest that the header's magic leads to.
    ///
    /// # Errors
    /// When there is none, or it is damaged.
    pub fn recover(image: &KernelImage) -> anyhow::Result<Self> {
        if let Some(bytes) = image.section_bytes(".BTF") {
            return Self::parse(bytes).context("The image's section .BTF cannot be used");
        }
        let found = find_all(&image.elf, &MAGIC)
            .filter_map(|at| Raw::parse(&image.elf[at..]).ok())
            .filter(|raw| raw.len() >= MIN_TYPES)
            .max_by_key(Raw::len);
        match found {
            Some(raw) => Ok(Self::index(raw)),
            None => bail!("The kernel image has no BTF (CONFIG_DEBUG_INFO_BTF)"),
        }
    }

    /// Parses the BTF that `bytes` begin with.
    ///
    /// # Errors
    /// Says which part of it is damaged.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        Raw::parse(bytes).map(Self::index)
    }

    fn index(raw: Raw) -> Self {
        let mut by_name: HashTable<TypeId> = HashTable::with_capacity(raw.len() / 2);
        for id in raw.ids() {
            let Some(record) = raw.get(id).filter(|r| r.name != 0 && is_indexed(r.kind)) else { continue };
            let name = raw.string_bytes(record.name);
            let same = |&other: &TypeId| {
                raw.get(other).is_some_and(|o| {
                    o.kind == record.kind && (o.name == record.name || raw.string_bytes(o.name) == name)
                })
            };
            let rehash =
                |&other: &TypeId| raw.get(other).map_or(0, |o| hash(o.kind, raw.string_bytes(o.name)));
            by_name.entry(hash(record.kind, name), same, rehash).or_insert(id);
        }
        Self { raw, by_name }
    }

    /// Number of types.
    pub fn type_count(&self) -> usize {
        self.raw.len()
    }

    /// Member by dotted path through anonymous structs and unions: `field("task_struct", "thread.sp")`;
    /// array elements as `name[3]`. The structure may be a struct, a union or a typedef of one.
    pub fn field(&self, structure: &str, path: &str) -> Option<Field> {
        let mut found = Place { ty: self.structure(structure)?, bit: 0, width: 0 };
        for step in path.split('.') {
            let (name, indexes) = step.split_at(step.find('[').unwrap_or(step.len()));
            let member = self.member(found.ty, name)?;
            found = Place { bit: found.bit.checked_add(member.bit)?, ..member };
            for index in indexes.split_inclusive(']').filter(|i| !i.is_empty()) {
                let index = index.strip_prefix('[')?.strip_suffix(']')?.parse().ok()?;
                found = self.element(found, index)?;
            }
        }
        self.finish(found)
    }

    /// Offset of a member in bytes.
    pub fn offset(&self, structure: &str, path: &str) -> Option<u64> {
        self.field(structure, path).map(|f| f.offset)
    }

    /// Size of a struct or union in bytes; of a typedef, what it stands for.
    pub fn size_of(&self, structure: &str) -> Option<u64> {
        self.size(self.structure(structure)?)
    }

    /// Members of a structure in order, those of anonymous structs and unions among them. Overlapping members of
    /// unions are all listed.
    pub fn members(&self, structure: &str) -> Option<Vec<Member<'_>>> {
        Some(self.members_of(self.structure(structure)?))
    }

    /// As [`Btf::members`], for a type that a member named; empty when it is no struct or union.
    pub fn members_of(&self, structure: TypeId) -> Vec<Member<'_>> {
        let mut members = Vec::new();
        self.visit(structure, &mut |name, place| {
            let ty = self.resolve(place.ty);
            if let (Some(ty), Some(field)) = (ty, self.finish(place)) {
                let (name, type_name) = (self.raw.string(name), self.type_name(place.ty));
                members.push(Member { name, field, kind: self.kind(ty), ty, type_name });
            }
            None::<()>
        });
        members
    }

    /// Element type (behind typedefs and qualifiers) and number of elements of an array that a member named.
    pub fn elements_of(&self, array: TypeId) -> Option<(TypeId, u32)> {
        let (element, count) = self.raw.get(array)?.array()?;
        Some((self.resolve(element)?, count))
    }

    /// Value of an enumerator, whatever enum it is in; of several, the first's.
    pub fn enumerator(&self, name: &str) -> Option<i64> {
        let records = self.raw.ids().filter_map(|id| self.raw.get(id));
        let enums = records.filter(|r| matches!(r.kind, Kind::Enum | Kind::Enum64));
        enums
            .flat_map(|r| r.enumerators().find(|&(n, _)| self.raw.string_is(n, name)))
            .map(|(_, value)| value)
            .next()
    }

    /// Parameter names and type names of a function, in order. Type names as in [`Member::type_name`].
    pub fn parameters(&self, function: &str) -> Option<Vec<(String, String)>> {
        let function = self.raw.get(self.find(Kind::Function, function)?)?;
        let prototype = self.raw.get(function.target()).filter(|r| r.kind == Kind::FunctionPrototype)?;
        let owned = |(name, ty)| (self.raw.string(name).to_owned(), self.type_name(ty));
        Some(prototype.parameters().map(owned).collect())
    }

    /// Offset of a variable in `.data..percpu`.
    pub fn percpu_offset(&self, variable: &str) -> Option<u64> {
        self.percpu_variables().find(|(name, _)| *name == variable).map(|(_, offset)| offset)
    }

    /// Per-CPU variables of the kernel itself, and their offsets from `__per_cpu_start` in bytes.
    pub fn percpu_variables(&self) -> impl Iterator<Item = (&str, u64)> {
        let records = self.raw.ids().filter_map(|id| self.raw.get(id));
        let mut sections =
            records.filter(|r| r.kind == Kind::DataSection && self.raw.string_is(r.name, PERCPU_SECTION));
        let variables: Vec<_> =
            sections.next().map_or_else(Vec::new, |section| section.variables().collect());
        variables.into_iter().filter_map(|(id, offset)| {
            let variable = self.raw.get(id).filter(|v| v.kind == Kind::Variable)?;
            Some((self.raw.string(variable.name), offset.into()))
        })
    }

    /// Size of the section they are in; None when BTF does not describe it.
    pub fn percpu_bytes(&self) -> Option<u64> {
        let mut records = self.raw.ids().filter_map(|id| self.raw.get(id));
        let is_section =
            |r: &Record<'_>| r.kind == Kind::DataSection && self.raw.string_is(r.name, PERCPU_SECTION);
        records.find(is_section).map(|section| section.value.into())
    }

    fn find(&self, kind: Kind, name: &str) -> Option<TypeId> {
        let is_it = |&id: &TypeId| {
            self.raw.get(id).is_some_and(|r| r.kind == kind && self.raw.string_is(r.name, name))
        };
        self.by_name.find(hash(kind, name.as_bytes()), is_it).copied()
    }

    /// The definition of a name. Incomplete ones (`Kind::Forward`) are never found.
    fn structure(&self, name: &str) -> Option<TypeId> {
        [Kind::Struct, Kind::Union, Kind::Typedef].into_iter().find_map(|kind| self.find(kind, name))
    }

    /// What is behind typedefs and qualifiers; None when they go in a circle.
    fn resolve(&self, mut id: TypeId) -> Option<TypeId> {
        for _ in 0..MAX_CHAIN {
            match self.raw.get(id) {
                Some(record) if is_alias(record.kind) => id = record.target(),
                _ => return Some(id),
            }
        }
        None
    }

    pub(crate) fn kind(&self, id: TypeId) -> Kind {
        self.raw.get(id).map_or(Kind::Void, |record| record.kind)
    }

    /// Size of a type in bytes; None for what has none.
    pub(crate) fn size(&self, mut id: TypeId) -> Option<u64> {
        let mut count = 1u64;
        for _ in 0..MAX_CHAIN {
            id = self.resolve(id)?;
            let record = self.raw.get(id)?;
            match record.kind {
                Kind::Array => {
                    let (element, elements) = record.array()?;
                    count = count.checked_mul(elements.into())?;
                    id = element;
                }
                Kind::Pointer => return count.checked_mul(POINTER_BYTES),
                Kind::Int | Kind::Struct | Kind::Union | Kind::Enum | Kind::Float | Kind::Enum64 => {
                    return count.checked_mul(record.value.into());
                }
                _ => return None,
            }
        }
        None
    }

    fn member(&self, structure: TypeId, name: &str) -> Option<Place> {
        self.visit(structure, &mut |n, place| self.raw.string_is(n, name).then_some(place))
    }

    fn element(&self, array: Place, index: u32) -> Option<Place> {
        let (element, count) = self.raw.get(self.resolve(array.ty)?)?.array()?;
        // A flexible array member has no length.
        if count != 0 && index >= count {
            return None;
        }
        let bits = self.size(element)?.checked_mul(8)?.checked_mul(index.into())?;
        Some(Place { ty: element, bit: array.bit.checked_add(bits)?, width: 0 })
    }

    fn finish(&self, place: Place) -> Option<Field> {
        let size = self.size(place.ty)?;
        Some(Field { offset: place.bit / 8, size, bits: ((place.bit % 8) as u8, place.width) })
    }

    /// Calls `each` with name and place of every member, through anonymous ones, until it answers.
    fn visit<T>(&self, structure: TypeId, each: &mut impl FnMut(u32, Place) -> Option<T>) -> Option<T> {
        let mut visits = MAX_VISITS;
        self.visit_nested(structure, 0, MAX_NESTING, &mut visits, each)
    }

    fn visit_nested<T>(
        &self,
        structure: TypeId,
        base: u64,
        nesting: u32,
        visits: &mut u32,
        each: &mut impl FnMut(u32, Place) -> Option<T>,
    ) -> Option<T> {
        let record = self.raw.get(self.resolve(structure)?)?;
        for member in record.members() {
            *visits = visits.checked_sub(1)?;
            let bit = base + u64::from(member.bit);
            let found = if member.name != 0 {
                each(member.name, Place { ty: member.ty, bit, width: member.width })
            } else if nesting > 0 {
                self.visit_nested(member.ty, bit, nesting - 1, visits, each)
            } else {
                None
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// The type as C writes it, without qualifiers; function pointers are `fn *`.
    fn type_name(&self, mut id: TypeId) -> String {
        let mut suffix = String::new();
        for _ in 0..MAX_CHAIN {
            let Some(record) = self.raw.get(id) else { return format!("void{suffix}") };
            match record.kind {
                Kind::Pointer => {
                    let space = usize::from(suffix.starts_with(' '));
                    suffix.insert_str(space, if space == 1 { "*" } else { " *" });
                    id = record.target();
                }
                Kind::Array => {
                    let Some((element, count)) = record.array() else { break };
                    // The outer dimension comes first: int a[2][3] is an array of 2 arrays.
                    let at = suffix.find(' ').unwrap_or(suffix.len());
                    suffix.insert_str(at, &format!("[{count}]"));
                    id = element;
                }
                kind if is_alias(kind) && kind != Kind::Typedef => id = record.target(),
                kind => return self.base_name(kind, &record) + &suffix,
            }
        }
        "?".to_owned()
    }

    fn base_name(&self, kind: Kind, record: &Record<'_>) -> String {
        let name = match self.raw.string(record.name) {
            "" => "(anonymous)",
            name => name,
        };
        match kind {
            Kind::Struct => format!("struct {name}"),
            Kind::Union => format!("union {name}"),
            Kind::Enum | Kind::Enum64 => format!("enum {name}"),
            Kind::Forward if record.flag => format!("union {name}"),
            Kind::Forward => format!("struct {name}"),
            Kind::FunctionPrototype => "fn".to_owned(),
            _ => name.to_owned(),
        }
    }
}

/// Where a member lies, and what it is.
#[derive(Clone, Copy)]
struct Place {
    ty: TypeId,
    /// From the start of the outermost structure, bits.
    bit: u64,
    width: u8,
}

fn is_indexed(kind: Kind) -> bool {
    matches!(kind, Kind::Struct | Kind::Union | Kind::Typedef | Kind::Function)
}

/// Kinds that only stand for another type.
fn is_alias(kind: Kind) -> bool {
    matches!(kind, Kind::Typedef | Kind::Volatile | Kind::Const | Kind::Restrict | Kind::TypeTag)
}

fn hash(kind: Kind, name: &[u8]) -> u64 {
    FxBuildHasher.hash_one((kind as u8, name))
}
