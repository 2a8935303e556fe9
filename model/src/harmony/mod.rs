//! gpt-oss's notation for conversations, called harmony: messages to text and tokens, and what the model answers back to
//! messages.
//!
//! ```text
//! <|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant<|channel|>final<|message|>4.<|return|>
//! ```
//!
//! A message is a header (who speaks, to whom, on which channel) and a text. The model thinks on the channel `analysis`,
//! calls tools on `commentary` and answers on `final`. Source: OpenAI's guide "OpenAI harmony response format". Texts and
//! tokens equal those that the crate openai-harmony 0.0.8 made of eleven conversations, and [`Message`] is read from its
//! JSON form. Of the schemas of tools, titles, examples and `oneOf` are left out.
//!
//! ```
//! use ternoss_model::harmony::{Analysis, Message, render};
//!
//! let prompt = render(&[Message::user("What is 2 + 2?")], Analysis::default());
//! assert!(prompt.starts_with("<|start|>user<|message|>What is 2 + 2?<|end|>"));
//! ```

mod parse;
mod render;

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

pub use parse::{Parser, Piece};
pub use render::{Analysis, render};

use crate::tokenizer::{Tokenizer, TokenizerError};

/// A conversation that cannot be turned into tokens, or tokens that are no text.
#[derive(Debug, thiserror::Error)]
pub enum HarmonyError {
    /// The model was not made for conversations in this notation.
    #[error("the model's tokenizer has no token {mark}, so the model does not know gpt-oss's conversations")]
    NoMark {
        /// The token.
        mark: &'static str,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Sets the frame: [`System`].
    System,
    /// Gives instructions and tools: [`Developer`].
    Developer,
    /// Asks.
    User,
    /// The model.
    Assistant,
    /// A tool answers; the message's name is the tool's.
    Tool,
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The speaker's name. A tool has one, such as `functions.get_weather`.
    #[serde(default)]
    pub name: Option<String>,
    /// Who is spoken to: the tool that is called, or `assistant` where a tool answers.
    #[serde(default)]
    pub recipient: Option<String>,
    /// `analysis`, `commentary` or `final`.
    #[serde(default)]
    pub channel: Option<String>,
    /// What the text is, such as `<|constrain|>json`.
    #[serde(default)]
    pub content_type: Option<String>,
    /// What is said.
    pub content: Vec<Content>,
}

impl Message {
    fn new(role: Role, content: Content) -> Self {
        Self { role, name: None, recipient: None, channel: None, content_type: None, content: vec![content] }
    }

    /// What a user says.
    pub fn user(text: impl Into<String>) -> Self {
        Self::new(Role::User, Content::Text { text: text.into() })
    }

    /// The frame of a conversation.
    pub fn system(system: System) -> Self {
        Self::new(Role::System, Content::SystemContent(system))
    }

    /// Its plain texts, one after the other.
    pub fn text(&self) -> String {
        let texts = self.content.iter().filter_map(|content| match content {
            Content::Text { text } => Some(text.as_str()),
            _ => None,
        });
        texts.collect()
    }
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Content {
    /// Plain text.
    Text {
        /// The text.
        text: String,
    },
    /// The frame of a conversation.
    SystemContent(System),
    /// Instructions and tools.
    DeveloperContent(Developer),
}

/// How long the model thinks before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Effort {
    /// Briefly.
    Low,
    /// What the model does when nothing else is asked for.
    #[default]
    Medium,
    /// At length.
    High,
}

/// Namespaces of tools by name, in that order.
pub type Tools = BTreeMap<String, Namespace>;

/// The frame of a conversation: who the model is, and how it shall answer.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct System {
    /// Who the model is.
    #[serde(default)]
    pub model_identity: Option<String>,
    /// How long it thinks.
    #[serde(default)]
    pub reasoning_effort: Option<Effort>,
    /// The day, as 2025-08-05.
    #[serde(default)]
    pub conversation_start_date: Option<String>,
    /// The month that the model's knowledge ends with, as 2024-06.
    #[serde(default)]
    pub knowledge_cutoff: Option<String>,
    /// The channels it may use.
    #[serde(default)]
    pub channel_config: Option<Channels>,
    /// Tools that are part of its system, such as a browser.
    #[serde(default)]
    pub tools: Tools,
}

impl Default for System {
    /// openai-harmony's frame, without a date.
    fn default() -> Self {
        let channels = ["analysis", "commentary", "final"].map(String::from);
        Self {
            model_identity: Some("You are ChatGPT, a large language model trained by OpenAI.".into()),
            reasoning_effort: Some(Effort::Medium),
            conversation_start_date: None,
            knowledge_cutoff: Some("2024-06".into()),
            channel_config: Some(Channels { valid_channels: channels.into(), channel_required: true }),
            tools: Tools::new(),
        }
    }
}

/// The channels that the model may use.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Channels {
    /// Their names.
    pub valid_channels: Vec<String>,
    /// Whether every message must be on one.
    pub channel_required: bool,
}

/// What the maker of an application tells the model.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Developer {
    /// How it shall answer.
    #[serde(default)]
    pub instructions: Option<String>,
    /// What it may call; those named `functions` are the application's own.
    #[serde(default)]
    pub tools: Tools,
}

/// Tools under one name.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Namespace {
    /// The name.
    pub name: String,
    /// What they are for.
    #[serde(default)]
    pub description: Option<String>,
    /// The tools; a namespace without any, such as `python`, takes plain text.
    #[serde(default)]
    pub tools: Vec<Tool>,
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: String,
    /// Its parameters as a JSON schema.
    #[serde(default)]
    pub parameters: Option<Value>,
}

/// The special tokens of the notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// A header follows.
    Start,
    /// The name of a channel follows.
    Channel,
    /// What the text is follows.
    Constrain,
    /// The text follows.
    Message,
    /// The text ends.
    End,
    /// The text ends, and with it the model's turn.
    Return,
    /// A call to a tool ends, and with it the model's turn.
    Call,
}

impl Mark {
    const ALL: [Self; 7] =
        [Self::Start, Self::Channel, Self::Constrain, Self::Message, Self::End, Self::Return, Self::Call];

    fn text(self) -> &'static str {
        match self {
            Self::Start => "<|start|>",
            Self::Channel => "<|channel|>",
            Self::Constrain => "<|constrain|>",
            Self::Message => "<|message|>",
            Self::End => "<|end|>",
            Self::Return => "<|return|>",
            Self::Call => "<|call|>",
        }
    }
}

/// The notation in the tokens of a model.
#[derive(Clone, Copy, Debug)]
pub struct Harmony<'a> {
    tokenizer: &'a Tokenizer,
    /// In the order of [`Mark::ALL`].
    ids: [u32; Mark::ALL.len()],
}

impl<'a> Harmony<'a> {
    /// The notation in a tokenizer's tokens.
    ///
    /// # Errors
    /// [`HarmonyError::NoMark`] when the tokenizer lacks one of the special tokens.
    pub fn new(tokenizer: &'a Tokenizer) -> Result<Self, HarmonyError> {
        let mut ids = [0; Mark::ALL.len()];
        for (id, mark) in ids.iter_mut().zip(Mark::ALL) {
            *id = tokenizer.token_id(mark.text()).ok_or(HarmonyError::NoMark { mark: mark.text() })?;
        }
        Ok(Self { tokenizer, ids })
    }

    /// The tokens that end the model's turn: `<|return|>` and `<|call|>`.
    pub fn stop_tokens(&self) -> [u32; 2] {
        [self.id(Mark::Return), self.id(Mark::Call)]
    }

    fn id(&self, mark: Mark) -> u32 {
        self.ids[mark as usize]
    }

    fn mark(&self, token: u32) -> Option<Mark> {
        self.ids.iter().position(|id| *id == token).map(|at| Mark::ALL[at])
    }
}
