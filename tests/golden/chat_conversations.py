"""Conversations that chat templates are compared on, for make_chat.py and tests/interop/chat_templates.py."""

import datetime


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def result(content):
    return {"role": "tool", "content": content, "name": "get_weather", "tool_call_id": "call00001"}


ARGUMENTS = {"city": "Köln 🌧", "days": 3, "f": 1.5, "deep": {"a": [1, None, True]}}
CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": 'Weather of a "city" <b>',
    "parameters": {"type": "object", "required": ["city"],
                   "properties": {"city": {"type": "string", "description": "where"},
                                  "days": {"type": "integer", "enum": [1, 2]}}}}}

CONVERSATIONS = {
    "one": [user("Hello!")],
    "system": [system("Be brief. "), user(" Hi\n")],
    "turns": [user("a"), assistant("b"), user("c'\"\\"), assistant("ünï 🌍\u00a0"), user(" d ")],
    "system and turns": [system("S"), user("a"), assistant("b"), user("c")],
    "ends with the assistant": [user("a"), assistant("b")],
    "thinks": [user("a"), assistant("<think>\nhmm\n</think>\n\nAnswer"), user("c")],
    "reasoning": [user("a"), assistant("b", reasoning_content="because "), user("c"),
                  assistant("d", reasoning_content="x")],
    "parts": [user([{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "what?"}])],
    "system in parts": [system([{"type": "text", "text": "S"}]), user([{"type": "text", "text": "T"}])],
    "two users": [user("a"), user("b"), assistant("c")],
    "starts with the assistant": [assistant("x"), user("y")],
    "unknown role": [{"role": "alien", "content": "?"}],
    "empty": [],
    "tool call": [user("q"), assistant(None, tool_calls=[CALL]), result('{"t": 3}'), assistant("Rain."), user("ok")],
    "arguments as text": [user("q"), assistant("", tool_calls=[
        {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}]), result("r")],
    "two calls": [system("S"), user("q"), assistant("let me", tool_calls=[CALL, {**CALL, "id": "call00002"}]),
                  result([{"type": "text", "text": "r"}]), {**result("r2"), "tool_call_id": "call00002"}, user("z")],
    "no content": [{"role": "user"}],
    "a number": [user(5)],
    "developer": [{"role": "developer", "content": "D"}, user("x")],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
VARIANTS = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "tools": [TOOL]},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"add_generation_prompt": True, "enable_thinking": True, "date_string": "26 Jul 2024", "tools": [TOOL, TOOL]},
]


def at_fixed_time(chat_template_utils):
    """strftime_now() says 2026-07-04 15:05:09, as the C++ side is told."""

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 7, 4, 15, 5, 9)

    chat_template_utils.datetime = Fixed
