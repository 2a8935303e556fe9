//! Guessing the next tokens from the text so far, to be checked by the model in one batch.
//!
//! Where the last tokens occurred before, what followed them then is guessed to follow again (prompt lookup decoding, Saxena
//! 2023): summaries, corrections and code repeat their input. A guess never changes the text, for every token is chosen from
//! the model's own logits, and a batch gives the bits of single steps; wrong guesses only cost time.

/// Longest run of last tokens that is looked for, and the shortest.
const LONGEST_MATCH: usize = 4;
const SHORTEST_MATCH: usize = 2;

/// Wrong guesses in a row after which fewer are made: the pause doubles with each, up to this many tokens.
const LONGEST_PAUSE: usize = 64;

/// Makes guesses and learns how good they are.
#[derive(Clone, Debug)]
pub(crate) struct Drafter {
    /// Tokens guessed at once at most.
    most: usize,
    /// Tokens guessed at once now.
    length: usize,
    /// Steps to go without a guess.
    pause: usize,
    /// The last pause.
    last_pause: usize,
}

impl Drafter {
    /// For guesses of up to `most` tokens.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, length: most.div_ceil(2), pause: 0, last_pause: 0 }
    }

    /// Tokens that may follow `history`; often none.
    pub(crate) fn draft<'a>(&mut self, history: &'a [u32]) -> &'a [u32] {
        if self.most == 0 {
            return &[];
        }
        if self.pause > 0 {
            self.pause -= 1;
            return &[];
        }
        (SHORTEST_MATCH..=LONGEST_MATCH)
            .rev()
            .find_map(|length| after_last(history, length))
            .map_or(&[], |following| &following[..self.length.min(following.len())])
    }

    /// Of a guess of `drafted` tokens, the first `accepted` were right.
    pub(crate) fn learn(&mut self, drafted: usize, accepted: usize) {
        match accepted {
            _ if drafted == 0 => {}
            0 => {
                self.last_pause = (2 * self.last_pause).clamp(1, LONGEST_PAUSE);
                self.pause = self.last_pause;
                self.length = (self.length / 2).max(1);
            }
            _ if accepted == drafted => {
                self.last_pause = 0;
                self.length = (2 * self.length).min(self.most);
            }
            _ => {
                self.last_pause = 0;
                self.length = (accepted + 1).min(self.most);
            }
        }
    }
}

/// What followed the last `length` tokens where they occurred before, the latest time.
fn after_last(history: &[u32], length: usize) -> Option<&[u32]> {
    let (before, last) = history.split_at(history.len().checked_sub(length)?);
    // An occurrence may overlap the last tokens, but must not be them.
    let start = (0..before.len()).rev().find(|&start| history[start..start + length] == *last)?;
    Some(&history[start + length..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_longest_match_is_guessed() {
        let history = [1, 2, 3, 4, 9, 9, 2, 3, 7, 7, 1, 2, 3];
        assert_eq!(Drafter::new(4).draft(&history), [4, 9], "after 1 2 3, not after the later 2 3");
        assert_eq!(Drafter::new(8).draft(&history), [4, 9, 9, 2]);
        assert_eq!(Drafter::new(4).draft(&[5, 5, 5, 5]), [5], "a repetition goes on");
        assert!(Drafter::new(4).draft(&[1, 2, 3, 4]).is_empty());
        assert!(Drafter::new(4).draft(&[1]).is_empty() && Drafter::new(4).draft(&[]).is_empty());
        assert!(Drafter::new(0).draft(&history).is_empty());
    }

    #[test]
    fn good_guesses_grow_and_bad_ones_become_rare() {
        let history = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2];
        let mut drafter = Drafter::new(8);
        drafter.learn(4, 4);
        assert_eq!(drafter.draft(&history), [3, 4, 5, 6, 7, 8, 9, 10]);
        drafter.learn(8, 2);
        assert_eq!(drafter.draft(&history), [3, 4, 5]);
        for _ in 0..20 {
            drafter.learn(3, 0);
        }
        let pauses = (0..100).take_while(|_| drafter.draft(&history).is_empty()).count();
        assert_eq!(pauses, LONGEST_PAUSE);
        assert_eq!(drafter.draft(&history), [3]);
    }
}
