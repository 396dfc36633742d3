"""Tokenizers small enough to compute by hand."""

from tiny_models import VOCABULARY


class Letters:
    """A tokenizer of one token a character; token 0 ends a text."""

    eos_token_id = 0
    chat_template: str | None = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1 + ord(letter) % (VOCABULARY - 1) for letter in text]}

    def decode(self, tokens, skip_special_tokens=True):
        tokens = [tokens] if isinstance(tokens, int) else tokens
        return "".join(chr(96 + token) for token in tokens)


class ChatLetters(Letters):
    chat_template = "any"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>"


class BareLetters(Letters):
    """A chat template that adds nothing."""

    chat_template = "bare"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return messages[-1]["content"]
