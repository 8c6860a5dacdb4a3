//! Lists the public items of a crate, from what rustdoc has written of it: `public-api FILE.json`

use std::error::Error;

/// No promise of ours: the compiler's own, and unstable
const INTERNAL: [&str; 3] = ["Freeze", "StructuralPartialEq", "UnsafeUnpin"];

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args_os().nth(1).ok_or("which file?")?;
    let api = public_api::Builder::from_rustdoc_json(file)
        .omit_blanket_impls(true) // what any type has
        .build()?;
    for item in api.items().map(ToString::to_string) {
        if !INTERNAL
            .iter()
            .any(|name| item.contains(&format!(" core::marker::{name} for ")))
        {
            println!("{item}");
        }
    }
    Ok(())
}
