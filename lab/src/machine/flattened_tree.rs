//! A device tree in the form in which QEMU writes and reads it (Devicetree Specification 0.4, chapter 5): parsed, and written again.
//!
//! Absent: memory that is reserved in the header, of which QEMU writes none, and everything that a property may mean.

use anyhow::{Context, Result, bail, ensure};

const MAGIC: u32 = 0xd00d_feed;
const VERSION: u32 = 17;
const LAST_COMPATIBLE_VERSION: u32 = 16;
const HEADER_BYTES: usize = 40;
/// The end of the list of memory that is reserved: an entry of nothing.
const NO_RESERVATIONS: [u8; 16] = [0; 16];

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOTHING: u32 = 4;
const END: u32 = 9;

/// A node, the tree's root among them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Node {
    /// What its parent knows it by: `pcie@10000000`.
    pub name: String,
    pub properties: Vec<(String, Vec<u8>)>,
    pub children: Vec<Node>,
}

impl Node {
    /// A node without children.
    pub fn new(name: String, properties: &[(&str, Vec<u8>)]) -> Node {
        let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        Node { name, properties, children: Vec::new() }
    }

    /// The value of a property.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.properties.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }

    /// Gives a property another value, or makes it.
    pub fn set(&mut self, name: &str, value: Vec<u8>) {
        match self.properties.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.properties.push((name.into(), value)),
        }
    }

    /// The tree in a file.
    pub fn parse(bytes: &[u8]) -> Result<Node> {
        ensure!(number(bytes, 0)? == MAGIC, "a device tree begins with other bytes");
        let at = |field: usize| Ok::<usize, anyhow::Error>(number(bytes, field)? as usize);
        let slice = |start: usize, length: usize| {
            start
                .checked_add(length)
                .and_then(|end| bytes.get(start..end))
                .context("a device tree is cut short")
        };
        let mut reader =
            Reader { structure: slice(at(8)?, at(36)?)?, strings: slice(at(12)?, at(32)?)?, at: 0 };
        match reader.token()? {
            BEGIN_NODE => reader.node(),
            other => bail!("a device tree begins with the token {other}"),
        }
    }

    /// The file of a tree.
    pub fn bytes(&self) -> Vec<u8> {
        let (mut structure, mut strings) = (Vec::new(), Vec::new());
        self.write(&mut structure, &mut strings);
        structure.extend(END.to_be_bytes());
        let structure_at = HEADER_BYTES + NO_RESERVATIONS.len();
        let strings_at = structure_at + structure.len();
        let header = [
            MAGIC,
            (strings_at + strings.len()) as u32,
            structure_at as u32,
            strings_at as u32,
            HEADER_BYTES as u32,
            VERSION,
            LAST_COMPATIBLE_VERSION,
            // The processor that boots.
            0,
            strings.len() as u32,
            structure.len() as u32,
        ];
        [cells(&header), NO_RESERVATIONS.into(), structure, strings].concat()
    }

    fn write(&self, structure: &mut Vec<u8>, strings: &mut Vec<u8>) {
        structure.extend(BEGIN_NODE.to_be_bytes());
        structure.extend(self.name.bytes().chain([0]));
        pad(structure);
        for (name, value) in &self.properties {
            let named: Vec<u8> = name.bytes().chain([0]).collect();
            let known = strings.windows(named.len()).position(|window| window == named);
            let place = known.unwrap_or_else(|| {
                strings.extend(&named);
                strings.len() - named.len()
            });
            structure.extend(cells(&[PROPERTY, value.len() as u32, place as u32]));
            structure.extend(value);
            pad(structure);
        }
        self.children.iter().for_each(|child| child.write(structure, strings));
        structure.extend(END_NODE.to_be_bytes());
    }
}

/// The numbers of a property: each has 32 bits, the largest byte first.
pub(super) fn cells(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The number of 32 bits at a place.
pub(super) fn number(bytes: &[u8], at: usize) -> Result<u32> {
    let four = bytes.get(at..at + 4).context("a device tree is cut short")?;
    Ok(u32::from_be_bytes(four.try_into()?))
}

struct Reader<'bytes> {
    structure: &'bytes [u8],
    strings: &'bytes [u8],
    at: usize,
}

impl Reader<'_> {
    /// What follows the beginning of a node, up to its end.
    fn node(&mut self) -> Result<Node> {
        let name = text(self.structure, self.at)?;
        self.skip(name.len() + 1);
        let mut node = Node { name, ..Node::default() };
        loop {
            match self.token()? {
                BEGIN_NODE => node.children.push(self.node()?),
                PROPERTY => {
                    let (length, name) = (self.token()? as usize, self.token()? as usize);
                    let value =
                        self.structure.get(self.at..self.at + length).context("a property is cut short")?;
                    node.properties.push((text(self.strings, name)?, value.into()));
                    self.skip(length);
                }
                NOTHING => {}
                END_NODE => return Ok(node),
                other => bail!("a device tree has the token {other}"),
            }
        }
    }

    fn token(&mut self) -> Result<u32> {
        let token = number(self.structure, self.at)?;
        self.at += 4;
        Ok(token)
    }

    fn skip(&mut self, length: usize) {
        self.at = (self.at + length).next_multiple_of(4);
    }
}

/// The text at a place, up to its zero.
fn text(bytes: &[u8], at: usize) -> Result<String> {
    let rest = bytes.get(at..).context("a device tree is cut short")?;
    let end = rest.iter().position(|byte| *byte == 0).context("a name has no end")?;
    Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Node {
        let mut root = Node::new(String::new(), &[("compatible", b"linux,dummy-virt\0".into())]);
        let mut bus = Node::new(
            "pcie@10000000".into(),
            &[("reg", cells(&[0x40, 0x1000_0000])), ("dma-coherent", vec![])],
        );
        bus.children.push(Node::new("port@2,0".into(), &[("reg", cells(&[0x1000, 0, 0, 0, 0]))]));
        root.children.push(bus);
        root
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = tree().bytes();
        assert_eq!(Node::parse(&bytes).unwrap(), tree());
        assert_eq!(number(&bytes, 4).unwrap() as usize, bytes.len());
        // A name is there once.
        assert_eq!(bytes.windows(4).filter(|window| window == b"reg\0").count(), 1);
    }

    #[test]
    fn values_are_changed_and_made() {
        let mut node = tree().children.remove(0);
        node.set("reg", cells(&[1]));
        node.set("linux,pci-domain", cells(&[7]));
        assert_eq!(
            (node.get("reg"), node.get("linux,pci-domain")),
            (Some(&[0, 0, 0, 1][..]), Some(&[0, 0, 0, 7][..]))
        );
        assert_eq!(node.properties.len(), 3);
    }

    #[test]
    fn what_is_no_tree_is_an_error() {
        let bytes = tree().bytes();
        for length in 0..bytes.len() {
            // Cut anywhere before the strings, or in them.
            assert!(Node::parse(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
        let mut other = bytes;
        other[HEADER_BYTES + NO_RESERVATIONS.len() + 3] = 9;
        assert!(Node::parse(&other).is_err());
    }
}
