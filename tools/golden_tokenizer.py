"""Write tests/goldens/tokenizer_smollm2.json: texts and the token ids that transformers reads from the GGUF file.

Needs transformers, torch and gguf, of which the project itself uses only gguf:

    python tools/golden_tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"

# No text has a digit after two spaces or more, or one outside ASCII after a space: transformers reads no pre-tokenizer
# from GGUF files and so leaves out the splitting of digits ("smollm"), which shows in what is merged with spaces there.
TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\tindented\twith tabs",
    "trailing spaces   ",
    "   leading spaces",
    "two  spaces   and    more",
    "line one\nline two\r\nline three\rline four",
    "\n \n  \n   mixed",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said it's John's; we'll see, you'd know, we're DON'T",
    "0",
    "1234567890",
    "3.14159 and 1,000,000 and 2024-02-29T23:59:60Z",
    "x1y22z333 v2.0.1 a1 b 2",
    "一二三½",
    "UPPER lower Title camelCase snake_case kebab-case",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "café naïve Ångström Straße İstanbul",
    "cafe\u0301 nai\u0308ve (combining)",
    "你好，世界。今天天气很好！",
    "こんにちは世界 カタカナ",
    "안녕하세요 세계",
    "Привет, мир! Как дела?",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "🙂🚀🎉",
    "👨‍👩‍👧‍👦 👍🏽 🇨🇭 ❤️",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕏 ∑∫√∞ ≠ ≤ ⊂",
    "\u00a0no-break\u00a0space\u2003em\u3000ideographic\u200bzero",
    "\u0000\u0001\u007f\ufeff\ufffd",
    "def f(x: int) -> int:\n    return x ** 2 if x else None  # square\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i] << 3;\n}\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "https://example.com/path?q=1&r=%20#frag user@example.com C:\\dir\\file.txt",
    '<div class="a"><p>text</p></div> <!-- comment -->',
    "!!!??? ... --- ___ *** ((([[[{{{",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "before<|endoftext|>after",
    "text <|im_end|> with spaces <|im_start|> around",
    "<|im_start |> <|im_end|",
    "<repo_name>a/b<file_sep>main.py<jupyter_start><empty_output>",
]


def main(file: Path) -> int:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    cases = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    written = {"transformers": transformers.__version__, "file": file.name, "cases": cases}
    out = GOLDENS / "tokenizer_smollm2.json"
    out.write_text(json.dumps(written, ensure_ascii=True, indent=None).replace('{"text"', '\n{"text"') + "\n", "utf-8")
    print(f"{out.name}: {len(cases)} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
