"""CLIP's byte-pair encoding stated anew and plainly, for comparison, and a small vocabulary of its format."""

from __future__ import annotations

import html
import itertools

import ftfy
import regex

PAIRS = """
t h|th e</w>|a n|an d</w>|i n|in g</w>|r e|re d</w>|a p|ap p|app l|appl e</w>|c a|ca t</w>|d o|do g</w>|' s</w>|' t</w>
o f</w>|' r|' re</w>|Ã ©</w>|Ã ©|c af|a f|caf Ã©</w>|ca f|caf é</w>|ð Ł|ðŁ ĺ|ðŁĺ Ģ</w>|ðŁĺ Ģ|! !</w>|! !|!! !!</w>
l l</w>|' ll</w>|1 2</w>|< |</w>|< |||> </w>|e n|en d|o f
end of|t ex|e x|tex t</w>|endof text</w>|x x|xx xx|x x</w>|xx xx</w>|a a|aa a</w>
""".replace("\n", "|")
BYTES = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
LETTER = {b: chr(b) for b in BYTES} | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in BYTES)}


def merges() -> list[tuple[str, str]]:
    """Pairs whose parts exist and whose results differ."""
    known, found = {*LETTER.values(), *(letter + "</w>" for letter in LETTER.values())}, []
    for first, _, second in (entry.partition(" ") for entry in PAIRS.split("|")):
        if first in known and second in known and first + second not in known:
            known.add(first + second)
            found.append((first, second))
    return found


def vocabulary() -> dict[str, int]:
    letters = list(LETTER.values())
    words = ["".join(pair) for pair in merges()]
    names = [*letters, *(letter + "</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    return {name: number for number, name in enumerate(names)}


def encode(caption: str) -> list[int]:
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    text = " ".join(text.split()).lower()
    ids, ranks = vocabulary(), {pair: rank for rank, pair in enumerate(merges())}
    result = []
    pieces = regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", text, regex.IGNORECASE)
    for piece in pieces:
        parts = [LETTER[byte] for byte in piece.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == best:
                    parts[place : place + 2] = ["".join(best)]
                place += 1
        result += [ids[part] for part in parts]
    return result
