//! Guessing the next tokens from the text so far, to be checked by the model in one batch.
//!
//! Where the last tokens occurred before, what followed them then is guessed to follow again (prompt lookup decoding, Saxena
//! 2023): summaries, corrections and code repeat their input. A guess never changes the text, for every token is chosen from
//! the model's own logits, and a batch gives the bits of single steps; wrong guesses only cost time. How much is measured while
//! the text is written, and what is not worth its time is guessed rarely.

use std::time::Duration;

/// Longest run of last tokens that is looked for, and the shortest.
const LONGEST_MATCH: usize = 4;
const SHORTEST_MATCH: usize = 2;

/// Steps without a guess between two that are not worth it, at most.
const LONGEST_PAUSE: usize = 64;

/// Share of the latest step in what is remembered of how long steps take, and of what guesses are worth.
const LATEST: f64 = 0.25;

/// Tokens guessed at first.
const FIRST_LENGTH: usize = 2;

/// Makes guesses and learns how good they are, and what they cost: hardly more time where the model reads the same weights
/// for all of them, nearly that of a step each where every token goes to experts of its own.
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
    /// Seconds of a step without guesses.
    step: Option<f64>,
    /// What checking a guessed token costs, in steps without guesses, once one was.
    cost: Option<f64>,
    /// What a guess has been worth lately: the tokens that were right, less the cost of all.
    worth: f64,
}

impl Drafter {
    /// For guesses of up to `most` tokens.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, length: FIRST_LENGTH.min(most), pause: 0, last_pause: 0, step: None, cost: None, worth: 0.0 }
    }

    /// Tokens that may follow `history`; often none, and none before it is known how long a step without them takes.
    pub(crate) fn draft<'a>(&mut self, history: &'a [u32]) -> &'a [u32] {
        if self.most == 0 || self.step.is_none() {
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

    /// Of a guess of `drafted` tokens, the first `accepted` were right, in a step that took so long.
    pub(crate) fn learn(&mut self, drafted: usize, accepted: usize, took: Duration) {
        let took = took.as_secs_f64();
        if drafted == 0 {
            follow(&mut self.step, took);
            return;
        }
        if let Some(step) = self.step.filter(|step| *step > 0.0) {
            // No more than that, for a step that the system interrupted says little.
            follow(&mut self.cost, ((took / step - 1.0) / drafted as f64).clamp(0.0, 2.0));
        }
        let worth = accepted as f64 - self.cost.unwrap_or(0.0) * drafted as f64;
        self.worth += LATEST * (worth - self.worth);
        if worth > 0.0 {
            self.last_pause /= 4;
            let all = accepted == drafted;
            self.length = (if all { 2 * self.length } else { accepted + 1 }).min(self.most);
        } else {
            self.last_pause = (2 * self.last_pause).clamp(1, LONGEST_PAUSE);
            self.length = (self.length / 2).max(1);
        }
        self.pause = if self.worth > 0.0 { 0 } else { self.last_pause };
    }
}

/// Brings a mean of what has been nearer to what is.
fn follow(mean: &mut Option<f64>, now: f64) {
    let mean = mean.get_or_insert(now);
    *mean += LATEST * (now - *mean);
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

    /// A step without guesses.
    const STEP: Duration = Duration::from_millis(10);

    /// A drafter that has seen one.
    fn drafter(most: usize) -> Drafter {
        let mut drafter = Drafter::new(most);
        drafter.learn(0, 0, STEP);
        drafter
    }

    #[test]
    fn what_followed_the_longest_match_is_guessed() {
        let history = [1, 2, 3, 4, 9, 9, 2, 3, 7, 7, 1, 2, 3];
        assert_eq!(drafter(8).draft(&history), [4, 9], "after 1 2 3, not after the later 2 3");
        assert_eq!(drafter(1).draft(&history), [4]);
        assert_eq!(drafter(4).draft(&[5, 5, 5, 5]), [5], "a repetition goes on");
        assert!(drafter(4).draft(&[1, 2, 3, 4]).is_empty());
        assert!(drafter(4).draft(&[1]).is_empty() && drafter(4).draft(&[]).is_empty());
        assert!(drafter(0).draft(&history).is_empty());
        assert!(Drafter::new(8).draft(&history).is_empty(), "nothing to compare with yet");
    }

    /// Teaches a drafter that checking a guessed token costs so many steps without guesses.
    fn with_cost(cost: f64) -> Drafter {
        let mut drafter = drafter(8);
        (0..40).for_each(|_| drafter.learn(2, 2, STEP.mul_f64(1.0 + 2.0 * cost)));
        drafter
    }

    #[test]
    fn good_guesses_grow_and_bad_ones_become_rare() {
        let history = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2];
        let mut drafter = with_cost(0.1);
        assert_eq!(drafter.draft(&history), [3, 4, 5, 6, 7, 8, 9, 10]);
        drafter.learn(8, 2, STEP.mul_f64(1.8));
        assert_eq!(drafter.draft(&history), [3, 4, 5]);
        for _ in 0..20 {
            drafter.learn(3, 0, STEP.mul_f64(1.3));
        }
        let pauses = |drafter: &mut Drafter| (0..100).take_while(|_| drafter.draft(&history).is_empty()).count();
        assert_eq!(pauses(&mut drafter), LONGEST_PAUSE);
        assert_eq!(drafter.draft(&history), [3]);
        // A text that begins to repeat itself is soon noticed.
        for guesses in 0.. {
            assert!(guesses < 6, "still a pause of {}", drafter.pause);
            if pauses(&mut drafter) == 0 {
                break;
            }
            drafter.learn(1, 1, STEP.mul_f64(1.1));
        }
    }

    #[test]
    fn what_costs_more_than_it_saves_becomes_rare() {
        // Of four tokens two are right: worth it where checking one costs a fifth of a step, not where it costs four fifths.
        for (cost, rare) in [(0.2, false), (0.8, true)] {
            let mut drafter = with_cost(cost);
            for _ in 0..30 {
                drafter.learn(4, 2, STEP.mul_f64(1.0 + 4.0 * cost));
            }
            assert_eq!(drafter.pause > 8, rare, "cost {cost}: a pause of {}", drafter.pause);
            assert_eq!(drafter.length, if rare { 1 } else { 3 }, "cost {cost}");
        }
        // More than a step each: never worth it, however right.
        assert!(with_cost(1.1).pause > 8);
    }

    #[test]
    fn a_step_that_was_interrupted_says_little() {
        let mut drafter = with_cost(0.2);
        drafter.learn(4, 4, STEP * 1000);
        assert!(drafter.cost.unwrap() < 0.7, "{:?}", drafter.cost);
        drafter.learn(4, 4, STEP.mul_f64(1.8));
        assert_eq!(drafter.pause, 0);
    }
}
