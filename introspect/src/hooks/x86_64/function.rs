//! Finding the instructions of a function that a trap may replace.

use super::Displaced;
use super::jump::{JUMP_LEN, Jump, is_movable, last_argument, needs_host};
use super::record::ARGUMENTS;
use crate::hooks::site::{Site, SiteError, cold_parts, main_part};
use crate::kernel::Kernel;
use crate::memory::Va;
use guest_profiles::hooks::Role;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use rustc_hash::FxHashSet;

/// Symbols that a return jumps to instead of `ret`: the kernel patches such a jump to `ret`, to another thunk, or leaves
/// it (arch/x86/lib/retpoline.S; the set grew with each mitigation).
pub(super) const RETURN_THUNKS: [&str; 5] = [
    "__x86_return_thunk",
    "zen_untrain_ret",
    "srso_return_thunk",
    "srso_alias_return_thunk",
    "retbleed_return_thunk",
];

/// A decoded function.
pub(in crate::hooks) struct Function {
    /// Its main part, then what the compiler put elsewhere because it is unlikely.
    parts: Vec<Part>,
    /// Addresses some branch inside the function goes to.
    targets: FxHashSet<u64>,
    /// The instructions that return: part, and index there.
    returns: Vec<(usize, usize)>,
    /// First jump that leaves for other code than a cold part.
    leaves: Option<Va>,
}

/// Code without a gap.
struct Part {
    start: Va,
    bytes: Vec<u8>,
    instructions: Vec<Instruction>,
}

impl Function {
    pub(in crate::hooks) fn decode(kernel: &Kernel, name: &str, start: Va) -> Result<Self, SiteError> {
        let main = main_part(kernel, name, start)?;
        let thunks: Vec<Va> = RETURN_THUNKS.iter().filter_map(|n| kernel.symbols.lookup(n)).collect();
        let cold = |va: Va| {
            let target = kernel.symbols.resolve(va);
            // 6.1's kallsyms has no `.cold` symbols of some objects; what lies behind _etext's text is cold code too.
            target.is_none_or(|t| {
                t.name.starts_with(name) || t.name.contains(".cold") || t.name == "_einittext"
            })
        };
        Self::build(start, main, &cold_parts(kernel, name), &thunks, cold)
    }

    /// `elsewhere` are parts that are the function's if it jumps there.
    fn build(
        start: Va,
        main: &[u8],
        elsewhere: &[(Va, &[u8])],
        thunks: &[Va],
        cold: impl Fn(Va) -> bool,
    ) -> Result<Self, SiteError> {
        let main = Part::decode(start, main)?;
        let reached =
            |start: Va, len: usize| main.branches().any(|to| (start..start + len as u64).contains(&to));
        let there = elsewhere.iter().filter(|(start, bytes)| reached(*start, bytes.len()));
        let there = there.map(|(start, bytes)| Part::decode(*start, bytes)).collect::<Result<Vec<_>, _>>()?;
        let mut function = Self {
            parts: std::iter::once(main).chain(there).collect(),
            targets: FxHashSet::default(),
            returns: Vec::new(),
            leaves: None,
        };
        function.follow(thunks, cold);
        Ok(function)
    }

    /// Finds where it goes.
    fn follow(&mut self, thunks: &[Va], cold: impl Fn(Va) -> bool) {
        let inside = |target: Va| self.parts.iter().any(|part| part.contains(target));
        for (k, part) in self.parts.iter().enumerate() {
            for (index, i) in part.instructions.iter().enumerate() {
                match i.flow_control() {
                    FlowControl::Return => self.returns.push((k, index)),
                    FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                        let target = Va(i.near_branch_target());
                        let always = i.flow_control() == FlowControl::UnconditionalBranch;
                        if always && thunks.contains(&target) {
                            self.returns.push((k, index));
                        } else if inside(target) {
                            self.targets.insert(target.0);
                        } else if !cold(target) {
                            self.leaves.get_or_insert(Va(i.ip()));
                        }
                    }
                    // Through a register or a table: to nobody knows where.
                    FlowControl::IndirectBranch => {
                        self.leaves.get_or_insert(Va(i.ip()));
                    }
                    _ => {}
                }
            }
        }
    }

    /// The first place behind the landing pad and the fentry slot that takes a trap; all arguments are still in their
    /// registers there, and the return address is on top of the stack.
    pub(in crate::hooks) fn entry(&self, trap_len: usize) -> Result<Site, SiteError> {
        let part = &self.parts[0];
        let is = |k: usize, what: fn(&Instruction) -> bool| part.instructions.get(k).is_some_and(what);
        let pad = usize::from(is(0, |i| i.mnemonic() == Mnemonic::Endbr64));
        let begin = pad + usize::from(is(pad, |i| i.flow_control() == FlowControl::Call));
        // Kernels without jump labels read a tracepoint's switch before anything else, and no trap can do that.
        let loads =
            part.instructions.get(begin..).unwrap_or_default().iter().take_while(|i| is_spare_load(i));
        let first = begin + loads.count();
        for i in part.instructions.get(begin..=first).ok_or(SiteError::NoCode)? {
            if self.targets.contains(&i.ip()) {
                let why = "a branch goes back to the beginning".to_owned();
                return Err(SiteError::Unsuitable(Va(i.ip()), why));
            }
        }
        let mut last = first;
        while part.length(first, last)? < trap_len {
            last += 1;
        }
        self.site(part, first, last)
    }

    /// The places just before each return: the result register is final there.
    pub(in crate::hooks) fn returns(&self, trap_len: usize) -> Result<Vec<Site>, SiteError> {
        if let Some(va) = self.leaves {
            return Err(SiteError::TailCall(va));
        }
        if self.returns.is_empty() {
            return Err(SiteError::NoReturn);
        }
        let before = |&(part, index): &(usize, usize)| self.before_return(&self.parts[part], index, trap_len);
        self.returns.iter().map(before).collect()
    }

    fn before_return(&self, part: &Part, index: usize, trap_len: usize) -> Result<Site, SiteError> {
        let at = Va(part.instructions[index].ip());
        if self.targets.contains(&at.0) {
            return Err(SiteError::Unsuitable(at, "a branch goes straight to the return".to_owned()));
        }
        let last = index.checked_sub(1).ok_or(SiteError::NoReturn)?;
        let mut first = last;
        while part.length(first, last)? < trap_len {
            first = first.checked_sub(1).ok_or(SiteError::NoReturn)?;
        }
        self.site(part, first, last)
    }

    /// Where a jump can take over from the trap at `site`.
    pub(in crate::hooks) fn jump(
        &self,
        role: Role,
        argument: u8,
        entry: bool,
        site: &Site,
    ) -> Result<Jump, SiteError> {
        let at = if entry { site.va } else { site.resume() };
        let unsuitable = |why: &str| SiteError::NoJump(at, why.to_owned());
        if needs_host(role) {
            return Err(unsuitable("the guest has to stand still for it"));
        }
        if last_argument(role, argument) >= ARGUMENTS {
            return Err(unsuitable("a record has not so many arguments"));
        }
        let (k, part) =
            self.parts.iter().enumerate().find(|(_, part)| part.contains(at)).ok_or(SiteError::NoCode)?;
        let first = part.instructions.binary_search_by_key(&at.0, Instruction::ip);
        let first = first.map_err(|_| SiteError::NoCode)?;
        if !entry {
            let is_whole = self.returns.contains(&(k, first)) && part.length(first, first)? == JUMP_LEN;
            return is_whole
                .then_some(Jump::Return { va: at })
                .ok_or_else(|| unsuitable("the return is too short"));
        }
        let mut len = 0;
        for (k, i) in part.instructions[first..].iter().enumerate() {
            if len >= JUMP_LEN {
                break;
            }
            let inside = |target: Va| self.parts.iter().any(|part| part.contains(target));
            // `entry` has seen to it that no branch goes back to the first.
            if !is_movable(i, inside) || k > 0 && self.targets.contains(&i.ip()) {
                return Err(SiteError::NoJump(Va(i.ip()), format!("{:?} cannot be moved", i.mnemonic())));
            }
            len += i.len();
        }
        if len < JUMP_LEN { Err(SiteError::NoCode) } else { Ok(Jump::Entry { va: at, len }) }
    }

    fn site(&self, part: &Part, first: usize, last: usize) -> Result<Site, SiteError> {
        let unsuitable = |i: &Instruction, why: &str| {
            SiteError::Unsuitable(Va(i.ip()), format!("{:?}{why}", i.mnemonic()))
        };
        let mut displaced = Vec::new();
        for (k, i) in part.instructions[first..=last].iter().enumerate() {
            if k > 0 && self.targets.contains(&i.ip()) {
                return Err(unsuitable(i, ", which is a branch target"));
            }
            let step = Displaced::from_instruction(i).ok_or_else(|| unsuitable(i, ""))?;
            if step.names_the_image() {
                return Err(unsuitable(i, " of an address that moves with the kernel"));
            }
            displaced.push(step);
        }
        let va = Va(part.instructions[first].ip());
        let offset = (va - part.start) as usize;
        let original = part.bytes[offset..offset + part.length(first, last)?].to_vec();
        Ok(Site { va, original, displaced })
    }
}

impl Part {
    fn decode(start: Va, bytes: &[u8]) -> Result<Self, SiteError> {
        let decoder = Decoder::with_ip(64, bytes, start.0, DecoderOptions::NONE);
        let decoded = |i: Instruction| {
            if i.is_invalid() { Err(SiteError::Undecodable(Va(i.ip()))) } else { Ok(i) }
        };
        let instructions = decoder.into_iter().map(decoded).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { start, bytes: bytes.to_vec(), instructions })
    }

    fn contains(&self, va: Va) -> bool {
        (self.start..self.start + self.bytes.len() as u64).contains(&va)
    }

    /// Where its jumps go.
    fn branches(&self) -> impl Iterator<Item = Va> {
        let jumps = |i: &&Instruction| {
            matches!(i.flow_control(), FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch)
        };
        self.instructions.iter().filter(jumps).map(|i| Va(i.near_branch_target()))
    }

    /// Bytes of the instructions from `first` to `last`.
    fn length(&self, first: usize, last: usize) -> Result<usize, SiteError> {
        let get = |k: usize| self.instructions.get(k).ok_or(SiteError::NoCode);
        Ok((get(last)?.next_ip() - get(first)?.ip()) as usize)
    }
}

/// True for a load from memory into a register that passes no argument.
fn is_spare_load(i: &Instruction) -> bool {
    let spare = matches!(i.op0_register().full_register(), Register::RAX | Register::R10 | Register::R11);
    i.mnemonic() == Mnemonic::Mov && spare && i.op1_kind() == OpKind::Memory
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Va = Va(0xffff_ffff_8100_0000);
    const THUNK: Va = Va(0xffff_ffff_8100_1000);

    fn function(bytes: &[u8]) -> Function {
        Function::build(START, bytes, &[], &[THUNK], |_| false).unwrap()
    }

    fn jump(from: usize, to: Va) -> [u8; 5] {
        let rel = (to - (START + from as u64 + 5)) as u32;
        let mut b = [0xe9, 0, 0, 0, 0];
        b[1..].copy_from_slice(&rel.to_le_bytes());
        b
    }

    /// fentry; push rbx; mov rbx,rdi; pop rbx; pop r15; jmp thunk
    fn usual() -> Vec<u8> {
        let mut b = vec![0xe8, 0, 0, 0, 0, 0x53, 0x48, 0x89, 0xfb, 0x5b, 0x41, 0x5f];
        b.extend(jump(12, THUNK));
        b
    }

    #[test]
    fn entry_is_behind_the_fentry_slot_and_covers_the_trap() {
        let f = function(&usual());
        let one = f.entry(1).unwrap();
        assert_eq!((one.va, one.original.as_slice()), (START + 5, &[0x53][..]));
        let two = f.entry(2).unwrap();
        assert_eq!((two.va, two.original.len(), two.resume()), (START + 5, 4, START + 9));
        assert_eq!(two.displaced[0], Displaced::Push(Register::RBX));
    }

    #[test]
    fn an_address_that_moves_with_the_kernel_is_not_displaced() {
        // push rbp; mov rdi,$address; ret
        let entry = |address: u32| {
            let mut b = vec![0x55, 0x48, 0xc7, 0xc7];
            b.extend(address.to_le_bytes());
            b.push(0xc3);
            function(&b).entry(2)
        };
        assert!(matches!(entry(0x81b4_5f80), Err(SiteError::Unsuitable(at, _)) if at == START + 1));
        assert_eq!(entry(0xffff_ff00).map(|site| site.original.len()), Ok(8), "a number");
        assert_eq!(entry(0x1000).map(|site| site.original.len()), Ok(8));
    }

    #[test]
    fn entry_skips_a_landing_pad() {
        let mut b = vec![0xf3, 0x0f, 0x1e, 0xfa];
        b.extend(usual());
        assert_eq!(function(&b).entry(1).unwrap().va, START + 9);
    }

    #[test]
    fn entry_is_behind_loads_that_leave_the_arguments_alone() {
        // fentry; mov eax,[rip+1]; push rbx; mov rbx,rdi
        let mut b = usual();
        b.splice(5..5, [0x8b, 0x05, 1, 0, 0, 0]);
        assert_eq!(function(&b).entry(2).unwrap().va, START + 11);
        // fentry; mov edi,[rip+1]: the argument is gone behind it.
        b[6] = 0x3d;
        assert!(function(&b).entry(2).is_err());
    }

    #[test]
    fn return_is_the_last_instruction_before_the_thunk() {
        let sites = function(&usual()).returns(2).unwrap();
        assert_eq!(sites.len(), 1);
        assert_eq!((sites[0].va, sites[0].resume()), (START + 10, START + 12));
    }

    #[test]
    fn one_byte_pops_are_taken_together_for_a_two_byte_trap() {
        // pop rbx; pop rbp; ret
        let sites = function(&[0x90, 0x5b, 0x5d, 0xc3]).returns(2).unwrap();
        assert_eq!((sites[0].va, sites[0].displaced.len()), (START + 1, 2));
    }

    #[test]
    fn a_branch_into_the_displaced_bytes_is_refused() {
        // je +1 (to pop rbp); pop rbx; pop rbp; ret
        let f = function(&[0x74, 0x01, 0x5b, 0x5d, 0xc3]);
        assert!(matches!(f.returns(2), Err(SiteError::Unsuitable(va, _)) if va == START + 3));
        assert!(f.returns(1).is_ok(), "a branch to the first displaced byte is fine");
    }

    #[test]
    fn a_branch_to_the_return_itself_is_refused() {
        // je +2 (to ret); pop r15; ret
        assert!(function(&[0x74, 0x02, 0x41, 0x5f, 0xc3]).returns(1).is_err());
    }

    #[test]
    fn tail_calls_are_no_returns() {
        let mut b = vec![0x41, 0x5f];
        b.extend(jump(2, START + 0x5000));
        assert_eq!(function(&b).returns(1), Err(SiteError::TailCall(START + 2)));
    }

    #[test]
    fn what_a_function_has_elsewhere_is_its_own_if_it_jumps_there() {
        let elsewhere = START + 0x5000;
        // test rax,rax; je elsewhere; pop rbx; pop r15; ret
        let mut main = vec![0x48, 0x85, 0xc0, 0x0f, 0x84];
        main.extend(((elsewhere - (START + 9)) as u32).to_le_bytes());
        main.extend([0x5b, 0x41, 0x5f, 0xc3]);
        let places = |cold: &[u8], at: Va| {
            let f = Function::build(START, &main, &[(at, cold)], &[], |_| true).unwrap();
            f.returns(1).map(|sites| sites.iter().map(|site| site.va).collect::<Vec<_>>())
        };
        // pop r15; ret
        let cold = [0x41, 0x5f, 0xc3];
        assert_eq!(places(&cold, elsewhere), Ok(vec![START + 10, elsewhere]));
        assert_eq!(places(&cold, elsewhere + 1), Ok(vec![START + 10]), "of another function of that name");
        // A jump back to the return leaves no room before it.
        let mut back = vec![0xe9];
        back.extend((START.0 + 12).wrapping_sub(elsewhere.0 + 5).to_le_bytes()[..4].iter());
        assert!(matches!(places(&back, elsewhere), Err(SiteError::Unsuitable(at, _)) if at == START + 12));
    }

    #[test]
    fn indirect_jumps_are_no_returns() {
        // jmp rax; pop r15; ret
        assert_eq!(function(&[0xff, 0xe0, 0x41, 0x5f, 0xc3]).returns(1), Err(SiteError::TailCall(START)));
    }

    #[test]
    fn a_return_that_may_not_happen_is_none() {
        // test rax,rax; je thunk; pop r15; ret
        let mut b = vec![0x48, 0x85, 0xc0, 0x0f, 0x84];
        b.extend(((THUNK - (START + 9)) as u32).to_le_bytes());
        b.extend([0x41, 0x5f, 0xc3]);
        assert_eq!(function(&b).returns(1), Err(SiteError::TailCall(START + 3)));
    }

    #[test]
    fn a_call_behind_the_fentry_slot_is_code() {
        // call fentry; call something: its arguments are gone behind it, and it cannot be displaced.
        let f = function(&[0xe8, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0x41, 0x5f, 0xc3]);
        assert!(matches!(f.entry(1), Err(SiteError::Unsuitable(va, _)) if va == START + 5));
    }

    #[test]
    fn a_loop_to_the_beginning_is_no_entry() {
        // call fentry; push rbx; pop rbx; jmp to the push
        let f = function(&[0xe8, 0, 0, 0, 0, 0x53, 0x5b, 0xeb, 0xfc]);
        assert!(matches!(f.entry(1), Err(SiteError::Unsuitable(va, _)) if va == START + 5));
    }

    #[test]
    fn junk_is_an_error_with_its_address() {
        let r = Function::build(START, &[0x90, 0x06], &[], &[], |_| false);
        assert!(matches!(r.err(), Some(SiteError::Undecodable(va)) if va == START + 1));
    }
}
