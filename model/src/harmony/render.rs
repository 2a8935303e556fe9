//! Messages to text and tokens.

use std::fmt::Write;

use serde_json::Value;

use super::{Content, Developer, Effort, Harmony, HarmonyError, Mark, Message, Role, System, Tools};

/// The namespace of an application's own tools.
const FUNCTIONS: &str = "functions";

/// What becomes of the model's earlier thoughts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Analysis {
    /// Thoughts that an answer followed are left out, as the model was trained: those before the last message on `final`.
    #[default]
    Drop,
    /// Everything stays.
    Keep,
}

/// A stretch of a rendered conversation. What people wrote is text, whatever it looks like, and never a mark.
enum Part {
    Mark(Mark),
    Text(String),
}

/// The text of a conversation that the model shall go on with.
pub fn render(messages: &[Message], analysis: Analysis) -> String {
    let text = |part| match part {
        Part::Mark(mark) => mark.text().into(),
        Part::Text(text) => text,
    };
    parts(messages, analysis).into_iter().map(text).collect()
}

impl Harmony<'_> {
    /// The tokens of a conversation that the model shall go on with.
    ///
    /// # Errors
    /// [`HarmonyError::Tokenizer`]
    pub fn prompt(&self, messages: &[Message], analysis: Analysis) -> Result<Vec<u32>, HarmonyError> {
        let mut tokens = Vec::new();
        for part in parts(messages, analysis) {
            match part {
                Part::Mark(mark) => tokens.push(self.id(mark)),
                Part::Text(text) => tokens.extend(self.tokenizer.encode_ordinary(&text)?),
            }
        }
        Ok(tokens)
    }
}

fn parts(messages: &[Message], analysis: Analysis) -> Vec<Part> {
    let on = |message: &Message, channel| message.channel.as_deref() == Some(channel);
    let answered = match analysis {
        Analysis::Drop => messages.iter().rposition(|message| on(message, "final")).unwrap_or(0),
        Analysis::Keep => 0,
    };
    let developers = messages.iter().flat_map(|message| &message.content).filter_map(|content| match content {
        Content::DeveloperContent(developer) => developer.tools.get(FUNCTIONS),
        _ => None,
    });
    let functions = developers.into_iter().any(|functions| !functions.tools.is_empty());
    let mut parts = Vec::new();
    for (number, message) in messages.iter().enumerate() {
        if number >= answered || !on(message, "analysis") {
            push_message(&mut parts, message, functions);
        }
    }
    parts.extend([Part::Mark(Mark::Start), Part::Text(name(Role::Assistant).into())]);
    parts
}

fn push_message(parts: &mut Vec<Part>, message: &Message, functions: bool) {
    let mut author = match (message.role, &message.name) {
        (Role::Tool, Some(name)) => name.clone(),
        (role, Some(name_of)) => format!("{}:{name_of}", name(role)),
        (role, None) => name(role).into(),
    };
    if let Some(recipient) = message.recipient.as_ref().filter(|recipient| *recipient != "all") {
        author += &format!(" to={recipient}");
    }
    parts.extend([Part::Mark(Mark::Start), Part::Text(author)]);
    if let Some(channel) = &message.channel {
        parts.extend([Part::Mark(Mark::Channel), Part::Text(channel.clone())]);
    }
    if let Some(content_type) = &message.content_type {
        match content_type.strip_prefix(Mark::Constrain.text()) {
            Some(format) => {
                parts.extend([Part::Text(" ".into()), Part::Mark(Mark::Constrain), Part::Text(format.into())]);
            }
            None => parts.push(Part::Text(format!(" {content_type}"))),
        }
    }
    parts.push(Part::Mark(Mark::Message));
    parts.extend(message.content.iter().map(|content| {
        Part::Text(match content {
            Content::Text { text } => text.clone(),
            Content::SystemContent(content) => system(content, functions),
            Content::DeveloperContent(content) => developer(content),
        })
    }));
    let calls = message.role == Role::Assistant && message.recipient.is_some();
    parts.push(Part::Mark(if calls { Mark::Call } else { Mark::End }));
}

pub(super) fn name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::Developer => "developer",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

/// The frame; `functions` says whether the application has tools of its own.
fn system(content: &System, functions: bool) -> String {
    let dated = |what: &str, date: &Option<String>| date.as_ref().map(|date| format!("{what}: {date}"));
    let about = [
        content.model_identity.clone(),
        dated("Knowledge cutoff", &content.knowledge_cutoff),
        dated("Current date", &content.conversation_start_date),
    ];
    let about: Vec<String> = about.into_iter().flatten().collect();
    let effort = content.reasoning_effort.map(|effort| match effort {
        Effort::Low => "Reasoning: low",
        Effort::Medium => "Reasoning: medium",
        Effort::High => "Reasoning: high",
    });
    let channels = content.channel_config.as_ref().filter(|channels| !channels.valid_channels.is_empty());
    let channels = channels.map(|channels| {
        let mut text = format!("# Valid channels: {}.", channels.valid_channels.join(", "));
        if channels.channel_required {
            text += " Channel must be included for every message.";
        }
        if functions {
            text += &format!("\nCalls to these tools must go to the commentary channel: '{FUNCTIONS}'.");
        }
        text
    });
    let about = Some(about.join("\n")).filter(|about| !about.is_empty());
    sections([about, effort.map(String::from), tools(&content.tools), channels])
}

fn developer(content: &Developer) -> String {
    let instructions = content.instructions.as_ref().map(|text| format!("# Instructions\n\n{text}"));
    sections([instructions, tools(&content.tools)])
}

fn sections<const N: usize>(sections: [Option<String>; N]) -> String {
    sections.into_iter().flatten().collect::<Vec<_>>().join("\n\n")
}

/// Tools as TypeScript declares functions.
fn tools(namespaces: &Tools) -> Option<String> {
    let mut text = "# Tools".to_string();
    for namespace in namespaces.values() {
        text += &format!("\n\n## {}\n", namespace.name);
        let comment = if namespace.tools.is_empty() { "" } else { "// " };
        push_lines(&mut text, comment, namespace.description.as_deref().unwrap_or_default());
        if namespace.tools.is_empty() {
            continue;
        }
        text += &format!("\nnamespace {} {{\n", namespace.name);
        for tool in &namespace.tools {
            push_lines(&mut text, "// ", &tool.description);
            let parameters = tool.parameters.as_ref().map(|schema| format!("_: {}", typescript(schema, "")));
            text += &format!("\ntype {} = ({}) => any;\n", tool.name, parameters.unwrap_or_default());
        }
        text += &format!("\n}} // namespace {}", namespace.name);
    }
    (!namespaces.is_empty()).then_some(text)
}

fn push_lines(text: &mut String, prefix: &str, lines: &str) {
    lines.lines().for_each(|line| *text += &format!("\n{prefix}{line}"));
}

/// A JSON schema as a TypeScript type: types, enums, arrays, objects with descriptions, defaults and what may be missing.
/// Anything else is `any`.
fn typescript(schema: &Value, indent: &str) -> String {
    if let Some(types) = schema["type"].as_array() {
        let names: Vec<&str> = types.iter().filter_map(Value::as_str).map(simple).collect();
        return names.join(" | ");
    }
    match schema["type"].as_str() {
        Some("object") => object(schema, indent),
        Some("array") if schema["items"].is_object() => format!("{}[]", typescript(&schema["items"], indent)),
        Some("array") => "Array<any>".into(),
        Some("string") => match schema["enum"].as_array() {
            Some(values) => values.iter().map(Value::to_string).collect::<Vec<_>>().join(" | "),
            None => "string".into(),
        },
        Some(name @ ("number" | "integer" | "boolean")) => simple(name).into(),
        _ => "any".into(),
    }
}

fn simple(name: &str) -> &str {
    if name == "integer" { "number" } else { name }
}

fn object(schema: &Value, indent: &str) -> String {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    if let Some(description) = schema["description"].as_str() {
        let _ = writeln!(text, "{indent}// {description}");
    }
    text += "{\n";
    let required = |key: &str| schema["required"].as_array().is_some_and(|keys| keys.iter().any(|known| known == key));
    for (key, property) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(description) = property["description"].as_str() {
            let _ = writeln!(text, "{indent}// {description}");
        }
        let optional = if required(key) { "" } else { "?" };
        let mut kind = typescript(property, &format!("{indent}    "));
        if property["nullable"] == true && !kind.contains("null") {
            kind += " | null";
        }
        let default = property.get("default").map(|default| match default.as_str() {
            Some(word) if property["enum"].is_array() => format!(" // default: {word}"),
            _ => format!(" // default: {default}"),
        });
        let _ = writeln!(text, "{indent}{key}{optional}: {kind},{}", default.unwrap_or_default());
    }
    text + indent + "}"
}
