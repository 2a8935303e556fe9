//! What the model answers, back to messages.

use super::{Content, Harmony, Mark, Message, Role, render::name};
use crate::tokenizer::{TextStream, TokenizerError};

/// Text that became complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The channel of the message that it belongs to.
    pub channel: Option<String>,
    /// The text.
    pub text: String,
}

/// Reads an answer token by token, as it goes on after [`Harmony::prompt`].
///
/// It takes everything that a model may write. A text ends at the next mark that ends or starts a message; what stands
/// before `<|message|>` is a header, and one without it is no message.
#[derive(Debug)]
pub struct Parser<'a> {
    harmony: Harmony<'a>,
    /// How the header begins: the prompt has named the speaker of the first message already.
    header: String,
    /// The header so far.
    header_tokens: Vec<u32>,
    open: Option<Open<'a>>,
    messages: Vec<Message>,
}

/// A message whose text is being written.
#[derive(Debug)]
struct Open<'a> {
    message: Message,
    text: String,
    stream: TextStream<'a>,
}

impl<'a> Harmony<'a> {
    /// The messages of a whole answer.
    ///
    /// # Errors
    /// [`TokenizerError`] for tokens that the tokenizer does not know.
    pub fn parse(&self, answer: &[u32]) -> Result<Vec<Message>, TokenizerError> {
        let mut parser = self.parser();
        for token in answer {
            parser.push(*token)?;
        }
        parser.finish()?;
        Ok(parser.messages)
    }

    /// Starts reading an answer token by token.
    pub fn parser(&self) -> Parser<'a> {
        let header = name(Role::Assistant).into();
        Parser { harmony: *self, header, header_tokens: Vec::new(), open: None, messages: Vec::new() }
    }
}

impl Parser<'_> {
    /// Takes the next token and returns the text of a message that became complete, if any.
    ///
    /// # Errors
    /// [`TokenizerError`] for a token that the tokenizer does not know.
    pub fn push(&mut self, token: u32) -> Result<Option<Piece>, TokenizerError> {
        match (self.harmony.mark(token), &mut self.open) {
            (Some(Mark::Start | Mark::End | Mark::Return | Mark::Call), _) => self.finish(),
            (Some(Mark::Message), None) => {
                let header = std::mem::take(&mut self.header)
                    + &self.harmony.tokenizer.decode(&std::mem::take(&mut self.header_tokens), false)?;
                let stream = self.harmony.tokenizer.stream();
                self.open = Some(Open { message: message(&header), text: String::new(), stream });
                Ok(None)
            }
            (_, None) => {
                self.header_tokens.push(token);
                Ok(None)
            }
            (_, Some(open)) => {
                let text = open.stream.push(token)?;
                Ok(text.map(|text| open.piece(text)))
            }
        }
    }

    /// Ends the message that is being written, if there is one, and returns the rest of its text.
    ///
    /// # Errors
    /// [`TokenizerError`]
    pub fn finish(&mut self) -> Result<Option<Piece>, TokenizerError> {
        self.header.clear();
        self.header_tokens.clear();
        let Some(mut open) = self.open.take() else {
            return Ok(None);
        };
        let stream = std::mem::replace(&mut open.stream, self.harmony.tokenizer.stream());
        let piece = stream.finish()?.map(|text| open.piece(text));
        let content = vec![Content::Text { text: open.text }];
        self.messages.push(Message { content, ..open.message });
        Ok(piece)
    }

    /// The messages that are complete.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }
}

impl Open<'_> {
    fn piece(&mut self, text: String) -> Piece {
        self.text += &text;
        Piece { channel: self.message.channel.clone(), text }
    }
}

/// A message without its text. The header is `ROLE to=RECIPIENT<|channel|>CHANNEL to=RECIPIENT <|constrain|>TYPE`, all
/// but the role optional.
fn message(header: &str) -> Message {
    let constrain = Mark::Constrain.text();
    let (header, format) = match header.split_once(constrain) {
        Some((header, format)) => (header, Some(format!("{constrain}{}", format.trim()))),
        None => (header, None),
    };
    let (author, channel) = header.split_once(Mark::Channel.text()).unwrap_or((header, ""));
    let (mut author, mut channel) = (author.split_whitespace(), channel.split_whitespace());
    let speaker = author.next().unwrap_or_default();
    let known = [Role::System, Role::Developer, Role::User, Role::Assistant];
    let role = known.into_iter().find(|role| name(*role) == speaker);
    // Anything else is the name of a tool.
    let (role, name) = role.map_or_else(|| (Role::Tool, Some(speaker.to_string())), |role| (role, None));
    let channel_name = channel.next().map(String::from);
    let mut message =
        Message { role, name, recipient: None, channel: channel_name, content_type: format, content: Vec::new() };
    for word in author.chain(channel) {
        match word.strip_prefix("to=") {
            Some(recipient) => message.recipient = Some(recipient.into()),
            None => message.content_type = Some(word.into()),
        }
    }
    message
}
