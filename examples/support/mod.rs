//! Shared by the examples: their command line
#![allow(dead_code, reason = "each example uses a part of it")]

use std::error::Error;

/// Reads a number after each name on the command line; absent numbers have the given defaults
pub(crate) fn numbers<const N: usize>(
    options: [(&str, usize); N],
) -> Result<[usize; N], Box<dyn Error + Send + Sync>> {
    let names = options.map(|(name, _)| name);
    let mut numbers = options.map(|(_, default)| default);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let place = names.iter().position(|known| *known == name);
        let number = arguments.next().and_then(|number| number.parse().ok());
        match (place, number) {
            (Some(place), Some(number)) => numbers[place] = number,
            _ => return Err(format!("these take a number each: {}", names.join(", ")).into()),
        }
    }
    Ok(numbers)
}
