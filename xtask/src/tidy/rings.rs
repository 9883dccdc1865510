//! Files that import each other: a ring of more than three cannot be read in any order.

use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use syn::visit::Visit;

use super::{Files, Violation};

/// The largest ring that a reader holds in mind.
const LARGEST: usize = 3;

/// The crates that are looked at, by the file that each begins with, and rings that are larger than they should be: how
/// many files each has. To be taken apart; what is smaller by now is to be written down.
const CRATES: &[(&str, &[usize])] = &[
    ("runtime/lib.rs", &[]),
    ("runtime/cli/main.rs", &[]),
    ("backends/src/lib.rs", &[]),
    ("nvgrace/src/lib.rs", &[]),
    ("lab/src/lib.rs", &[]),
    ("xtask/src/main.rs", &[]),
];

/// Violations in the crates of these files.
pub fn check(files: &Files) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for (root, known) in CRATES {
        let rings = rings(files, root)?;
        let sizes: Vec<usize> = rings.iter().map(Vec::len).collect();
        if sizes == *known {
            continue;
        }
        for ring in &rings {
            let what = format!("{} files import each other: {}", ring.len(), ring.join(", "));
            violations.push(Violation::new(root, what));
        }
        let what = format!("rings of {sizes:?} files; xtask/src/tidy/rings.rs knows of {known:?}");
        violations.push(Violation::new(root, what));
    }
    Ok(violations)
}

/// The rings of a crate that are too large, the largest first, each with its files.
fn rings(files: &Files, root: &str) -> Result<Vec<Vec<String>>> {
    let modules = Modules::of(files, root)?;
    let mut rings: Vec<Vec<String>> = components(&modules.imports())
        .into_iter()
        .filter(|ring| ring.len() > LARGEST)
        .map(|ring| ring.into_iter().map(|module| modules.files[&module].clone()).collect())
        .collect();
    rings.sort_by_key(|ring| std::cmp::Reverse(ring.len()));
    Ok(rings)
}

/// A path of modules from the crate's root on.
type Module = Vec<String>;

/// A crate's modules that are files. The root is left out: it lists the others, and so do parents that only list.
struct Modules {
    files: BTreeMap<Module, String>,
    /// The paths that each one's code names, from the crate's root on.
    named: BTreeMap<Module, BTreeSet<Module>>,
    /// What each module gives out of others under a name of its own.
    given_out: BTreeMap<Module, Module>,
}

impl Modules {
    fn of(files: &Files, root: &str) -> Result<Self> {
        let folder = root.rsplit_once('/').map_or("", |(folder, _)| folder);
        let (mut of_files, mut named, mut given_out) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (name, text) in files {
            let Some(inner) = name.strip_prefix(&format!("{folder}/")) else { continue };
            let Some(module) = module_of(inner, name == root) else { continue };
            // Programs and packages beside the library, and tests, which may import anything.
            let is_other = module
                .first()
                .is_some_and(|first| ["cli", "programs", "fuzz", "tests", "bin"].contains(&first.as_str()));
            if is_other || module.last().is_some_and(|last| last.contains("tests") || last == "fakes") {
                continue;
            }
            let parsed = syn::parse_file(text).with_context(|| format!("parsing {name}"))?;
            let mut names = Names { module: &module, found: BTreeSet::new(), given_out: BTreeMap::new() };
            names.visit_file(&parsed);
            given_out.append(&mut names.given_out);
            named.insert(module.clone(), names.found);
            of_files.insert(module, name.clone());
        }
        anyhow::ensure!(of_files.len() > 1, "{root} has no modules");
        Ok(Self { files: of_files, named, given_out })
    }

    /// Which module imports which.
    fn imports(&self) -> BTreeMap<Module, BTreeSet<Module>> {
        let of = |module: &Module, paths: &BTreeSet<Module>| {
            let to = paths.iter().filter_map(|path| self.behind(path));
            // A parent is named for what it gives out; its list of children is no import.
            to.filter(|to| to != module && !module.starts_with(to)).collect::<BTreeSet<Module>>()
        };
        let all = self.named.iter().filter(|(module, _)| !module.is_empty());
        all.map(|(module, paths)| (module.clone(), of(module, paths))).collect()
    }

    /// The module that has what a path names, wherever it is given out.
    fn behind(&self, path: &Module) -> Option<Module> {
        let mut path = path.clone();
        for _ in 0..8 {
            let given = (1..=path.len()).rev().find_map(|end| Some((end, self.given_out.get(&path[..end])?)));
            match given {
                Some((end, real)) if *real != path => path = [real, &path[end..]].concat(),
                _ => break,
            }
        }

        (1..=path.len()).rev().map(|end| path[..end].to_vec()).find(|part| self.files.contains_key(part))
    }
}

/// The module that a file is, by its path from the crate's folder on.
fn module_of(inner: &str, is_root: bool) -> Option<Module> {
    let name = inner.strip_suffix(".rs")?;
    if is_root {
        return Some(Vec::new());
    }
    let mut module: Module = name.split('/').map(str::to_owned).collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    Some(module)
}

/// The paths that a file's code names.
struct Names<'a> {
    module: &'a Module,
    found: BTreeSet<Module>,
    given_out: BTreeMap<Module, Module>,
}

impl Names<'_> {
    /// From the crate's root on; nothing for what is of other crates.
    fn absolute(&self, path: &[String]) -> Option<Module> {
        let (first, rest) = path.split_first()?;
        let mut base = self.module.clone();
        match first.as_str() {
            "crate" => base.clear(),
            "self" => {}
            "super" => {
                base.pop()?;
            }
            _ => return None,
        }
        let mut rest = rest;
        while let Some((_, others)) = rest.split_first().filter(|(next, _)| *next == "super") {
            base.pop()?;
            rest = others;
        }
        base.extend(rest.iter().cloned());
        Some(base)
    }

    fn tree(&mut self, before: &[String], tree: &syn::UseTree, is_public: bool) {
        match tree {
            syn::UseTree::Path(path) => {
                let path_so_far = [before, &[path.ident.to_string()]].concat();
                self.tree(&path_so_far, &path.tree, is_public);
            }
            syn::UseTree::Name(name) => self.leaf(before, &name.ident.to_string(), None, is_public),
            syn::UseTree::Rename(renamed) => {
                self.leaf(before, &renamed.ident.to_string(), Some(renamed.rename.to_string()), is_public);
            }
            syn::UseTree::Glob(_) => self.found.extend(self.absolute(before)),
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|item| self.tree(before, item, is_public))
            }
        }
    }

    fn leaf(&mut self, before: &[String], name: &str, renamed: Option<String>, is_public: bool) {
        let own = [name.to_owned()];
        let path: Vec<String> = if name == "self" { before.to_vec() } else { [before, &own].concat() };
        // `pub use gate::Gate` in a parent: of its own child.
        let absolute =
            self.absolute(&path).or_else(|| is_public.then(|| [&self.module[..], &path[..]].concat()));
        let Some(absolute) = absolute else { return };
        if is_public {
            let given = [&self.module[..], &[renamed.unwrap_or_else(|| name.to_owned())]].concat();
            self.given_out.insert(given, absolute);
        } else {
            self.found.insert(absolute);
        }
    }
}

impl<'ast> Visit<'ast> for Names<'_> {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let is_public = !matches!(item.vis, syn::Visibility::Inherited);
        self.tree(&[], &item.tree, is_public);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let words: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.found.extend(self.absolute(&words));
        syn::visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        // Tests in a file may import anything.
        if module.ident != "tests" {
            syn::visit::visit_item_mod(self, module);
        }
    }
}

/// Strongly connected components: modules that reach each other. A crate has some hundred files, so each one's reach is
/// simply computed.
fn components(imports: &BTreeMap<Module, BTreeSet<Module>>) -> Vec<Vec<Module>> {
    let reaches = |from: &Module| {
        let (mut seen, mut left) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(module) = left.pop() {
            for to in imports.get(&module).into_iter().flatten() {
                if seen.insert(to.clone()) {
                    left.push(to.clone());
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&Module, BTreeSet<Module>> =
        imports.keys().map(|module| (module, reaches(module))).collect();
    let mut components: Vec<Vec<Module>> = Vec::new();
    for module in imports.keys() {
        if components.iter().flatten().any(|known| known == module) {
            continue;
        }
        let is_mutual = |other: &&Module| {
            reached[module].contains(*other) && reached.get(other).is_some_and(|back| back.contains(module))
        };
        let mut ring: Vec<Module> = imports.keys().filter(is_mutual).cloned().collect();
        if ring.is_empty() {
            ring.push(module.clone());
        }
        components.push(ring);
    }
    components
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::made_up;

    /// Four files that import each other, one by a name that the root gives out.
    const RING: &[(&str, &str)] = &[
        ("c/lib.rs", "mod a; mod b; mod d; mod e; pub use d::Given;\n"),
        ("c/a.rs", "use crate::b::B;\n"),
        ("c/b/mod.rs", "mod inner; use crate::Given;\n"),
        ("c/b/inner.rs", "use super::super::a;\n"),
        ("c/d.rs", "fn f() { crate::e::g() }\n"),
        ("c/e.rs", "use super::a::{self, A};\n#[cfg(test)] mod tests { use crate::b::B; }\n"),
    ];

    fn sizes(files: &[(&str, &str)]) -> Vec<usize> {
        rings(&made_up(files), "c/lib.rs").unwrap().iter().map(Vec::len).collect()
    }

    #[test]
    fn a_ring_of_four_files_is_found_through_what_is_given_out() {
        let found = rings(&made_up(RING), "c/lib.rs").unwrap();
        assert_eq!(found, [["c/a.rs", "c/b/mod.rs", "c/d.rs", "c/e.rs"]]);
    }

    #[test]
    fn a_smaller_ring_a_parent_and_tests_are_fine() {
        let mut files = RING.to_vec();
        files[4].1 = "fn f() {}\n";
        assert_eq!(sizes(&files), [0_usize; 0]);
    }
}
