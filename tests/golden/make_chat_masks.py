#!/usr/bin/env python3
"""Which ids of a conversation are the assistant's, by transformers: ids and mask of apply_chat_template.

  tests/golden/make_chat_masks.py >tests/golden/chat_masks.json      (transformers)

The template marks replies with {% generation %} for transformers; pare gets the same template without the marks, and
finds them by rendering prefixes. The tokenizer is the tiny teacher's.
"""
import json
import pathlib

from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '### assistant\n' }}"
            "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}"
            "{{ '### ' + m['role'] + '\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}")
CONVERSATIONS = [
    [("user", "What does install() do?"), ("assistant", "It copies files.")],
    [("system", "Be brief."), ("user", "And then?"), ("assistant", "Nothing."), ("user", "Why?\nTell me."),
     ("assistant", "Because a target was not found."), ("user", "I see")],
    [("assistant", "Hello."), ("user", "Hé, ça va? \U0001F600"), ("assistant", "Très bien \U0001F600!")],
]


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "examples/teacher/tokenizer.json"),
                                        eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    cases = []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        out = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=True, return_dict=True,
                                            return_assistant_tokens_mask=True)
        cases.append({"messages": messages, "ids": list(out["input_ids"]), "mask": list(out["assistant_masks"])})
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    print(json.dumps({"template": plain, "cases": cases}))


main()
