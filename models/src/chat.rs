//! Chat templates: Jinja programs that turn messages into the text that a model was trained on.
//!
//! As transformers renders them (`utils/chat_template_utils.py`): blocks trimmed (`trim_blocks`, `lstrip_blocks`),
//! Python's string methods, `raise_exception`, `strftime_now`, and a `tojson` that leaves HTML signs alone.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::date::{DAY_SECONDS, civil};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, Output, State, context, escape_formatter};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// Why a template gives no text.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is not Jinja, or uses what is not supported.
    #[error("chat template: {}", .0.detail().map_or_else(|| .0.kind().to_string(), str::to_owned))]
    Template(#[source] minijinja::Error),
    /// The template refuses these messages (`raise_exception`).
    #[error("chat template refuses the messages: {message}")]
    Refused {
        /// What the template says.
        message: String,
    },
}

/// Steps that a template may take: enough for thousands of messages, and an end to endless loops.
const FUEL: u64 = 10_000_000;

/// Marks an error that the template raised itself, to tell it from those of the interpreter.
const RAISED: &str = "raise_exception: ";

/// Renders `messages`. `bos` and `eos` are the texts of those tokens; `add_generation_prompt` appends the opening of
/// the assistant's turn. The text is to be encoded by [`crate::Tokenizer::encode_rendered`]: special tokens stand in it.
///
/// # Errors
///
/// [`ChatError::Refused`] if the template calls `raise_exception`, [`ChatError::Template`] for all else.
pub fn render_chat(
    template: &str,
    messages: &[Message],
    bos: &str,
    eos: &str,
    add_generation_prompt: bool,
) -> Result<String, ChatError> {
    render_at(SystemTime::now(), template, messages, bos, eos, add_generation_prompt)
}

fn render_at(
    now: SystemTime,
    template: &str,
    messages: &[Message],
    bos: &str,
    eos: &str,
    add_generation_prompt: bool,
) -> Result<String, ChatError> {
    let mut env = Environment::new();
    // No HTML here, so nothing is escaped.
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(as_python);
    env.add_filter("tojson", to_json);
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    env.add_function("strftime_now", move |format: String| strftime(&format, now));
    let rendered = env.render_str(
        template,
        context! { messages, bos_token => bos, eos_token => eos, add_generation_prompt, tools => (), documents => () },
    );
    rendered.map_err(|error| match error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
        Some(message) => ChatError::Refused { message: message.into() },
        None => ChatError::Template(error),
    })
}

/// Writes a value as Python's `str` does, where Jinja's Rust twin differs: `True`, `False`, `None`.
fn as_python(out: &mut Output, state: &State, value: &Value) -> Result<(), minijinja::Error> {
    match value.kind() {
        ValueKind::None => Ok(out.write_str("None")?),
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        _ => escape_formatter(out, state, value),
    }
}

/// `json.dumps(value, ensure_ascii=False)`, with or without `indent`.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    const MAX_INDENT: usize = 64;
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut json, Spaced)),
        Some(indent) => {
            let spaces = " ".repeat(indent.min(MAX_INDENT));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut json, formatter))
        }
    };
    let failed =
        |reason: String| minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {reason}"));
    written.map_err(|error| failed(error.to_string()))?;
    String::from_utf8(json).map_err(|error| failed(error.to_string()))
}

/// Python's separators: a space behind commas and colons.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// The time as `format` says, in UTC. Templates ask for dates, and `%d %b %Y` is all that published ones use.
fn strftime(format: &str, now: SystemTime) -> Result<String, minijinja::Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    // 1970-01-01 was a Thursday.
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / DAY_SECONDS, seconds % DAY_SECONDS);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[days as usize % 7]);
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        text += &match rest.next() {
            Some('Y') => format!("{year:04}"),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('d') => format!("{day:02}"),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map_or(String::new(), String::from);
                let message = format!(
                    "strftime_now: `%{other}` is not known, known are %Y %y %m %B %b %d %A %a %H %M %S %%"
                );
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
            }
        };
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn say(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn chat_ml() {
        let template = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
                        {{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}\
                        {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
                        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let text = render_chat(template, &[say("user", "Hi")], "", "", true).unwrap();
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(text, expected);
    }

    /// The forms of LLaMA 2 and 3: slices, Python methods, `namespace`, trimmed blocks, `raise_exception`.
    #[test]
    fn llama() {
        let template = "\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>' + messages[0]['content'].strip() + '<</SYS>> ' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate!') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].title() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
";
        let talk =
            [say("system", " Be kind. "), say("user", "Hi "), say("assistant", "hello"), say("user", "Bye")];
        let text = render_chat(template, &talk, "<s>", "</s>", false).unwrap();
        assert_eq!(text, "<s>[INST] <<SYS>>Be kind.<</SYS>> Hi [/INST] Hello </s><s>[INST] Bye [/INST]");

        let refused = render_chat(template, &[say("assistant", "hello")], "<s>", "</s>", false);
        assert!(matches!(refused, Err(ChatError::Refused { message }) if message == "Roles must alternate!"));
    }

    #[test]
    fn python_prints() {
        let template =
            "{{ messages[0] | tojson }} {{ none }} {{ true }} {{ [1, 'a<b'] | tojson }}{{ absent }}";
        let text = render_chat(template, &[say("user", "a \"b\" é\n")], "", "", false).unwrap();
        assert_eq!(text, r#"{"role": "user", "content": "a \"b\" é\n"} None True [1, "a<b"]"#);
    }

    #[test]
    fn dates() {
        // 2024-02-29 12:34:56 was a Thursday; 2000-01-01 a Saturday.
        let text = |template: &str, seconds| render_at(at(seconds), template, &[], "", "", false).unwrap();
        assert_eq!(
            text("{{ strftime_now('%d %b %Y, %A %H:%M:%S') }}", 1_709_210_096),
            "29 Feb 2024, Thursday 12:34:56"
        );
        assert_eq!(text("{{ strftime_now('%a %m/%y') }}", 946_684_800), "Sat 01/00");
        assert!(render_at(at(0), "{{ strftime_now('%Q') }}", &[], "", "", false).is_err());
    }

    #[test]
    fn bad_templates_are_errors() {
        let endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}";
        for template in
            ["{% if %}", "{{ messages[0].content.nothing() }}", "{{ 1 // 0 }}", "{% generation %}", endless]
        {
            let rendered = render_chat(template, &[say("user", "Hi")], "", "", false);
            assert!(matches!(rendered, Err(ChatError::Template(_))), "{template}");
        }
    }
}
