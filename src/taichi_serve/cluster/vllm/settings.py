"""Settings of `taichi serve` in a file: what a file of `--config` says becomes words of the command line, and
what a command line said becomes settings again.

A setting is called like its flag, without the dashes in front (`p_heavy` or `p-heavy`). vLLM reads such files
too, but drops a `false`, takes YAML's `off` for no value, and cannot say lists of JSON. Every engine would
read the file again whenever it starts: here it is read once, and engines get its words.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from taichi_serve.cluster.vllm.yamlfile import read

CONFIG = "--config"
MASK = "(masked)"  # stands for what is secret
# Secrets that a server without them takes from its environment.
FROM_ENVIRONMENT = {"api_key": "VLLM_API_KEY", "hf_token": "HF_TOKEN"}
SECRET = re.compile(r"secret|passw|credential|api_?key|access_?key|auth_?token|hf_token", re.IGNORECASE)
USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
# YAML takes these words for true and false, where they are not in quotes.
YAML_WORDS = {True: ("on", "yes", "true"), False: ("off", "no", "false")}
NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
NO_SETTINGS = ("help", "config")


# ------------------------------------------------------------------------------------ from a file to words


def expanded(argv: list[str], serve: argparse.ArgumentParser) -> list[str]:
    """The words after `taichi serve`, with those of the file in the place of `--config FILE`.

    What the command line says itself goes before what the file says. Raises ValueError or OSError with one
    line to say.
    """
    words = [part for word in argv for part in _apart(word)]
    if CONFIG not in words:
        return argv
    if words.count(CONFIG) > 1:
        raise ValueError(f"{CONFIG}: there can be only one")
    at = words.index(CONFIG)
    before, after = words[:at], words[at + 2 :]
    if at + 1 == len(words):
        raise ValueError(f"{CONFIG}: no file is named")
    if after and not after[0].startswith("-"):  # the model: argparse wants it first
        before, after = [after[0], *before], after[1:]
    rest = [*before, *after]
    own = rest[:1] if rest and not rest[0].startswith("-") else []
    said = _said(rest, serve) | ({"model"} if own else set())
    try:
        settings = {key: value for key, value in read(words[at + 1]).items() if _dest(key, serve) not in said}
        model = settings.pop("model", None)
        lead = own if model is None else [_text(model)]
        found = [word for key, value in settings.items() for word in to_words(key, value, serve)]
    except (ValueError, yaml.YAMLError) as wrong:
        raise ValueError(f"{CONFIG}: {words[at + 1]}: {' '.join(str(wrong).split())}") from None
    except OSError as wrong:
        raise ValueError(f"{CONFIG}: {words[at + 1]}: {wrong.strerror}") from None
    return [*lead, *found, *rest[len(own) :]]


def to_words(key: str, value: Any, serve: argparse.ArgumentParser) -> list[str]:
    """The words that say one setting; raises ValueError where no words can."""
    flag, action = _flag(key), _action(key, serve)
    if flag == CONFIG:
        raise ValueError("a file of settings cannot name another one")
    _check(key, flag, value)
    if _masked(value):
        return _from_environment(flag, value)
    if action is None or "." in key:  # argparse says what is wrong; a field of an object is vLLM's own way
        return [f"{flag}={value if isinstance(value, str) else json.dumps(value, default=str)}"]
    if action.nargs == 0:
        return _switch(flag, value, action)
    match value:
        case None:
            found = [] if action.default in (None, argparse.SUPPRESS) else [f"{flag}=None"]
        case bool():
            found = _word_of(flag, value, action)
        case list():
            found = _several(flag, value, action)
        case _:
            found = [f"{flag}={_text(value)}"]
    return found


def _check(key: str, flag: str, value: Any) -> None:
    if not NAME.fullmatch(key):
        raise ValueError(f"{key[:80]!r} is no name of a setting")
    if isinstance(value, dict | list):
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as wrong:  # such as a date
            raise ValueError(f"{flag}: it cannot be said in JSON: {wrong}") from None


def _apart(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith(f"{CONFIG}=") else [word]


def _flag(key: str) -> str:
    name, dot, inner = key.partition(".")
    return "--" + name.replace("_", "-") + dot + inner


def _action(key: str, serve: argparse.ArgumentParser) -> argparse.Action | None:
    return serve._option_string_actions.get(_flag(key).partition(".")[0])


def _dest(key: str, serve: argparse.ArgumentParser) -> str | None:
    action = _action(key, serve)
    return None if action is None or "." in key else action.dest


def _said(words: list[str], serve: argparse.ArgumentParser) -> set[str]:
    """What these words of a command line set, by argparse's names."""
    found = set()
    for word in words:
        name = word.split("=")[0]
        name = name.replace("_", "-") if name.startswith("--") else name
        if (action := serve._option_string_actions.get(name)) is not None:
            found.add(action.dest)
    return found


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _switch(flag: str, value: Any, action: argparse.Action) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, bool):
        raise ValueError(f"{flag}: true or false, not {value!r}")
    if value:
        return [flag]
    negated = flag.startswith("--no-")
    longs = (name for name in action.option_strings if name.startswith("--"))
    return [name for name in longs if name.startswith("--no-") != negated][:1]


def _word_of(flag: str, value: bool, action: argparse.Action) -> list[str]:
    """`autotune: off` is false to YAML; the token of `--hf-token` may be left out."""
    if action.nargs == "?":
        return [flag] if value else []
    for word in YAML_WORDS[value]:
        if action.choices is not None and word in action.choices:
            return [f"{flag}={word}"]
    said = str(value).lower()
    raise ValueError(f"{flag}: needs a value, not {said} (a word that YAML takes for it needs quotes)")


def _several(flag: str, values: list[Any], action: argparse.Action) -> list[str]:
    texts = [_text(value) for value in values]
    if isinstance(action, argparse._AppendAction):
        return [f"{flag}={text}" for text in texts]
    if action.nargs is None:
        whole = json.dumps(values)
        if _plain(whole, action):
            raise ValueError(f"{flag}: one value, not a list")
        return [f"{flag}={whole}"]
    if not texts:
        raise ValueError(f"{flag}: an empty list")
    if len(texts) == 1:
        return [f"{flag}={texts[0]}"]
    if wrong := [text for text in texts if text.startswith("-")]:
        raise ValueError(f"{flag}: {wrong[0]!r} of several cannot begin with a dash")
    return [flag, *texts]


def _plain(text: str, action: argparse.Action) -> bool:
    """Whether a flag takes this text as it is, and so is none for JSON."""
    try:
        return action.type in (None, str) or bool(action.type(text) == text)  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - whatever a type raises: argparse will say it
        return False


def _masked(value: Any) -> bool:
    return MASK in json.dumps(value, default=str)


def _from_environment(flag: str, value: Any) -> list[str]:
    """One key, or the token, may come from where a server without the flag has it from."""
    name = FROM_ENVIRONMENT.get(flag.removeprefix("--").replace("-", "_"))
    if value in (MASK, [MASK]) and name is not None and os.environ.get(name):
        return []
    where = f", set {name}" if name is not None else ""
    raise ValueError(f"{flag}: {MASK} stands for what is secret: write it in{where}, or give {flag} anew")


# ------------------------------------------------------------------------------- from words to settings


class Recording(argparse.ArgumentParser):
    """A parser that remembers the words of every flag that was given."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.words: dict[argparse.Action, list[str]] = {}
        super().__init__(*args, **more)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        before = self.words.get(action, []) if isinstance(action, argparse._AppendAction) else []
        self.words[action] = [*before, *arg_strings]
        return super()._get_values(action, arg_strings)

    def given(self, args: argparse.Namespace) -> dict[str, Any]:
        """What was said, as settings that `to_words` makes the same of; `args` is what was parsed."""
        return {
            name_of(action): _value(action, words, getattr(args, action.dest))
            for action, words in self.words.items()
            if action.option_strings and name_of(action) not in NO_SETTINGS
        }


def name_of(action: argparse.Action) -> str:
    """What the setting of a flag is called in a file."""
    return next(name for name in action.option_strings if name.startswith("--"))[2:].replace("-", "_")


def _value(action: argparse.Action, words: list[str], parsed: Any) -> Any:
    if action.nargs == 0 or not words:  # `--hf-token` alone
        return bool(parsed)
    if isinstance(action, argparse._AppendAction) or action.nargs == "+":
        return [_json(word) for word in words]
    if isinstance(parsed, int | float) and not isinstance(parsed, bool):
        return parsed
    found = _json(words[0])
    return words[0] if isinstance(found, list) and _plain(words[0], action) else found


def _json(word: str) -> Any:
    """An object or a list where the word is one in JSON, so that it can be read and edited."""
    if word[:1] not in ("{", "["):
        return word
    try:
        return json.loads(word)
    except ValueError:
        return word


def text(settings: Mapping[str, Any]) -> str:
    """A file for `--config`, with what is secret masked, and told of in its first lines."""
    shown = {key: masked(key, value) for key, value in settings.items()}
    hidden = [key for key, value in shown.items() if _masked(value)]
    head = f"# Secret, so that it must be given anew: {', '.join(hidden)}\n" if hidden else ""
    return head + yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def masked(key: str, value: Any) -> Any:
    """The same without keys, tokens and passwords."""
    match value:
        case dict():
            return {name: masked(f"{key}.{name}", one) for name, one in value.items()}
        case list():
            return [masked(key, one) for one in value]
        case str() if _secret(key):
            return MASK
        case str():
            return USER_OF_URL.sub(MASK, value)
    return value


def _secret(key: str) -> bool:
    return SECRET.search(key) is not None or key.endswith(".keys")
