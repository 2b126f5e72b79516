"""What counts as one token for `ptb`: a table of forms, tried as a lexer tries them.

At each place the form that reaches farthest wins, what it must see behind itself
included; among equals the first. The forms describe what Stanford's PTBTokenizer of
CoreNLP 3.4.1 does, told by its documentation and by trying; letters in forms match in
either case, ranges as they are written.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

Change = Callable[[str], str]


@dataclass(frozen=True)
class Form:
    """One kind of token: its spelling, what must follow, and what becomes of it."""

    pattern: re.Pattern[str]  # group "t": the token, followed by what must follow
    change: Change | None = None
    give_back: int = 0  # characters at its end that are read again


def _ranges(wanted: Callable[[str], bool]) -> str:
    """The inside of a character class of all BMP characters that are wanted."""
    found: list[list[int]] = []
    for code in range(min(0x10000, sys.maxunicode)):
        if wanted(chr(code)):
            if found and found[-1][1] == code - 1:
                found[-1][1] = code
            else:
                found.append([code, code])
    return "".join(rf"\u{a:04x}-\u{b:04x}" for a, b in found)


# Marks that stand inside words without being letters: accents, vowel signs, ...
_MARKS = (
    r"\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u036f\u0375\u0378\u0379\u0384\u0385"
    r"\u03f6\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5"
    r"\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u06e7-\u06ed\u06fd\u06fe"
    r"\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u07fa\u0900-\u0903\u093c"
    r"\u093e-\u094e\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc-\u09c4\u09c7\u09c8"
    r"\u09cb-\u09cd\u09d7\u09e2\u09e3\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83"
    r"\u0abc-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03"
    r"\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e30-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ebc"
    r"\u0ec8-\u0ecd\u06ee\u06ef\u06fa-\u06ff\u1885\u1886"
)
_SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
_BREAK = rf"(?:{_SPACE}|\n)"
_QUOTE = r"(?:['\u0092\u2019]|(?i:&apos;))"  # an apostrophe
_QUOTES = r"(?:['\u0092\u2019`\u0091\u2018\u201b]|(?i:&apos;))"  # or taken for one
_STOPS = r"[,;:\u3001]"  # marks within a sentence
_NOT_URL = r" \t\n\f\r\"<>|(){}"
_FILES = """
bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3
pdf php pl png ppt ps py sql tar txt wav x xml zip
"""
# Abbreviations keep their full stop. A letter before ! counts as it is written, the
# others in either case. These may end a sentence:
_ENDING = """
al ala apr ariz A!rk assn aug A!z bancorp bhd bldg blvd bros calif co colo conn corp
cos ct dak dec D!el ed.d esq est etc ext feb fla fri ga I!ll inc ind intl jan jr jul
jun kan kans ky L!a ltd mar M!ass md mich minn M!iss mo mon mont neb nev nov oct okla
O!re P!a penn ph.d plc ppte! ppte!s ppty! ppty!s pte! pte!s pty! pty!s rd rt sep sept
seq sq sr sys tel tenn T!ex thu thurs tue tues univ va vt W!ash wed wis wisc wyo
"""
# these stand before a name:
_TITLES = """
a.k.a adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl
dept det dr drs elec ens ft gen gov govs hon insp invt jos lieut lt maj messrs mf!g
M!iss mlle mme mr mrs ms msgr mt mt!g natl pfc ph pres prof profs pvt rep reps rev sen
sens sfc sgt spc st ste supt supts treas vs wm
"""
# and these before a number.
_NUMBERED = "art bldg ca fig figs no nos op pp prop"


def _any(words: str) -> str:
    """A pattern for one of the words, the longest first."""
    longest = sorted(words.split(), key=len, reverse=True)
    spelled = "|".join(longest).replace(".", r"\.")
    exact = re.sub("(.)!", r"(?-i:\1)", spelled)
    return f"(?i:{exact})"


ABBREVIATIONS = re.compile("|".join(map(_any, (_ENDING, _TITLES, _NUMBERED))))
# Words that open a sentence: before them "U.S." ends one, and "I." is a letter.
_OPENERS = (
    "(?-i:A)(?:bout|ccording|dditionally|fter|n|s|t)?|(?-i:B)ut|(?-i:E)arlier"
    "|(?-i:H)(?:ere|er|e|owever)|(?-i:I)[fnt]|(?-i:L)ast|(?-i:M)(?:any|ore|[rs]\\.)"
    "|(?-i:N)ow|(?-i:O)(?:nce|ne|ther|ur)|(?-i:S)(?:he|ince|ome|o|uch)"
    "|(?-i:T)h(?:at|eir|en|ere|ese|ey|e|is)|(?-i:W)(?:e|hen|hile|hat)|(?-i:Y)(?:et|ou)"
)
_COUNTRIES = (
    "(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\\.S|U\\.S\\.-(?:U\\.S\\.S\\.R|U\\.K))"
)
_TAG = (
    r"<(?:[!?][A-Za-z\-][^>\r\n]*|[A-Za-z][\w:.\-]*"
    r"(?:[ ]+(?:[A-Za-z][\w:.\-]*[ ]*=[ ]*(?:'[^']*'|\"[^\"]*\")|[A-Za-z][\w:.\-]*))*"
    r"[ ]*/?|/[A-Za-z][\w:.\-]*)[ ]*>"
).replace(r"\w", "A-Za-z0-9_")
# Every other character that is a token by itself, as found by trying each.
_SYMBOLS = (
    r"[!-/:-@\[-`{-~"
    r"\u0080\u0091-\u0094\u0096\u0097\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b4"
    r"\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3"
    r"\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a"
    r"\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd"
    r"\u2013-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e"
    r"\u2080-\u208e\u20a0\u20a4\u20ac\u2100\u2101\u2103-\u2106\u2108\u2109\u2114"
    r"\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144"
    r"\u214a-\u214d\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
    r"]"
)


def _hard_space(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _phone(text: str) -> str:
    return _brackets(_hard_space(text))


def _no_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _ampersand(text: str) -> str:
    return re.sub("(?i)&amp;", "&", text)


def quotes(text: str) -> str:
    """Quotation marks as the treebank writes them, with ' where they stand alone."""
    text = re.sub("&apos;", "'", text)
    for marks, plain in (
        ("\u0091\u2018\u201b\u2039", "`"),
        ("\u0092\u2019\u203a", "'"),
        ("\u0093\u201c\u00ab", "``"),
        ("\u0094\u201d\u00bb", "''"),
    ):
        for mark in marks:
            text = text.replace(mark, plain)
    return text


def _money(text: str) -> str:
    text = text.replace("\u00a2", "cents").replace("\u00a3", "#")
    return re.sub("[\u0080\u00a4\u20a0\u20ac]", "$", text)


_PARTS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4"}
_PARTS |= {"\u2153": "1/3", "\u2154": "2/3"}
_CURRENCY = (
    r"[\u00a2-\u00a5\u0080\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]"
)
_BRACKET_NAMES = (("{", "-LCB-"), ("}", "-RCB-"), ("[", "-LSB-"), ("]", "-RSB-"))


@lru_cache
def forms() -> list[Form]:
    """All forms, in the order that decides between equally long ones."""
    table: list[Form] = []

    def add(
        *spellings: str,
        then: str = "",
        change: Change | None = None,
        give_back: int = 0,
    ) -> None:
        for spelling in spellings:
            pattern = re.compile(f"(?P<t>{spelling}){then}")
            table.append(Form(pattern, change, give_back))

    letter = _ranges(str.isalpha)
    digit = _ranges(str.isdecimal)
    plain = rf"[{letter}{digit}]"
    digit = rf"[{digit}\u07c0-\u07c9]"
    _add_words(add, letter, digit, plain)
    _add_numbers(add, digit)
    _add_abbreviations(add, letter, digit)
    _add_marks(add)
    _add_compounds(add, letter, plain)
    _add_quotes(add)
    add(rf"{_SPACE}+|[\0\x7f\u200b\u200e\u200f\ufeff]|(?i:&nbsp;)", change=lambda _: "")
    return table


def _word(letter: str, digit: str) -> str:
    one = rf"(?:[{letter}{_MARKS}]|(?i:&[aeiou](?:acute|grave|uml);))"
    more = rf"{one}(?:{one}|{digit})*"
    return rf"{more}(?:[.!?]{more})*"


def _add_words(add: Callable[..., None], letter: str, digit: str, plain: str) -> None:
    word = _word(letter, digit)
    add(r"[cC][+][+]", r"(?i:[cf])#")
    add(r"(?i:cannot)", give_back=3)
    add(r"(?i:'twas)", give_back=3)
    add(r"(?i:'tis)", give_back=2)
    add(r"(?i:gonna|gotta|lemme|gimme|wanna)", give_back=2)
    add(_TAG, change=_hard_space)
    add(r"(?i:&(?:MD|mdash|ndash);)|[\u0096\u0097\u2013-\u2015]", change=lambda _: "--")
    add(r"(?i:&amp;)", change=_ampersand)
    add(r"(?i:&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);)")
    short = rf"{_QUOTE}(?:(?i:re|ve|ll)|[msdMSD])"  # 's 're 'll
    no = rf"(?i:n){_QUOTES}(?i:t)"  # n't
    add(word, then=short, change=_no_soft_hyphens)
    add(r"[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*", then=no, change=_no_soft_hyphens)
    add(word, change=_no_soft_hyphens)
    _add_apostrophes(add, letter)
    address = rf"[^{_NOT_URL}]+[^{_NOT_URL}.!?,\-]"
    add(rf"(?i:https?)://{address}")
    path = r"/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},\-]"
    www = r"(?i:www)\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+"
    # ,-_ is a range in the original, so that a site's name has no digits or capitals.
    site = r"(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+"
    add(rf"{www}[a-zA-Z]{{2,4}}(?:{path})?", rf"{www}?[a-zA-Z]{{2,4}}{path}")
    top = "(?i:com|net|org|edu)"
    add(rf"{site}{top}(?:{path})?", rf"{site}?{top}{path}")
    host = r"[^ \t\n\f\r\"<>|(){}.\xa0]+"
    add(
        rf"(?:(?i:&lt;)|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\xa0{{}}]*@(?:{host}\.)*{host}"
        r"(?:(?i:&gt;)|>)?"
    )
    one = rf"(?:[{letter}{_MARKS}]|(?i:&[aeiou](?:acute|grave|uml);))"
    add(r"@[a-zA-Z_][a-zA-Z_0-9]*", rf"#{one}+")
    add(short, no, then=r"[^A-Za-z]", change=quotes)


def _add_apostrophes(add: Callable[..., None], letter: str) -> None:
    """Words that hold an apostrophe, or begin or end with one."""
    add(
        rf"{_QUOTE}(?i:n){_QUOTE}?",
        rf"[lLdDjJ]{_QUOTE}",
        rf"(?i:Dunkin|somethin|ol){_QUOTE}",
        rf"{_QUOTE}(?i:em|cause|till?)",
        rf"[A-HJ-XZn]{_QUOTES}[{letter}]{{2}}[{letter}]*",
        rf"{_QUOTE}[2-9]0(?i:s)",
        rf"[{letter}][{letter}]*[aeiouyAEIOUY]{_QUOTES}[aeiouA-Z][{letter}]*",
        r"(?i:cont'd\.?|'twas|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
        rf"(?i:O){_QUOTES}(?i:o)",
    )
    add(rf"(?i:y){_QUOTE}", then=rf"[{letter}]")


def _add_numbers(add: Callable[..., None], digit: str) -> None:
    add(rf"{digit}{{1,2}}[\-/]{digit}{{1,2}}[\-/]{digit}{{2,4}}")  # a date
    number = rf"[\-+]?(?:{digit}*(?:[.:,\xad\u066b\u066c]{digit}+)+|{digit}+)"
    add(number, change=_no_soft_hyphens)
    raised = r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+"
    add(rf"[\u207a\u207b\u208a\u208b]?(?:{raised})")
    four = rf"{digit}{{1,4}}"
    add(rf"(?:{four}[- \xa0])?{four}(?:\\?/|\u2044){four}", change=_hard_space)
    add(r"[\u00bc-\u00be\u2153-\u215e]", change=lambda text: _PARTS.get(text, text))
    add(
        r"(?i:-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\.D\.s|pro-|anti-|S(?:&amp;|&)P-500"
        rf"|S(?:&amp;|&)Ls)|(?i:Cap){_QUOTE}(?i:n)|(?i:c){_QUOTE}(?i:est)",
        change=_ampersand,
    )
    part = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    add(rf"{part}(?:\\?/{part}){{1,2}}")
    add(r"[A-Z]*\$|#")
    add(_CURRENCY, change=_money)


def _add_abbreviations(add: Callable[..., None], letter: str, digit: str) -> None:
    """Abbreviations and single letters, with or without their full stop."""
    dotted = r"[A-Za-z](?:\.[A-Za-z])*"
    opener = rf"{_BREAK}+(?:(?i:{_OPENERS})|{_TAG}){_BREAK}"
    # "I. The": a letter, and a full stop; "U.S. The" keeps its own.
    add(r"[A-Za-z]\.", then=opener, give_back=1)
    add(rf"{_COUNTRIES}\.", rf"{dotted}\.", then=opener)
    add(rf"{_any(_NUMBERED)}\.", then=rf"{_BREAK}?{digit}")
    add(r"(?i:pt)[eyEY]\.|(?i:co)\.", then=rf"{_SPACE}(?i:ltd|lim)")
    add(rf"{_any(_ENDING)}\.", then=r"[\s\S]{2}")
    add(rf"{_any(_ENDING)}\.")
    add(rf"{_any(_TITLES)}\.", rf"{_COUNTRIES}\.", rf"{dotted}\.")
    add(_any(_TITLES), then=_SPACE)
    add(_COUNTRIES, dotted, then=_BREAK)
    add(rf"{_QUOTE}[0-9][0-9]", then=_BREAK)
    one = rf"(?:[{letter}{_MARKS}]|{digit})"
    add(rf"{one}+(?:\.{one}+)*\.{_any(_FILES)}", then=rf"(?:{_BREAK}|[.?!,])")
    add(rf"{_word(letter, digit)}\.", then=_STOPS, change=_no_soft_hyphens)
    gap = r"[\- \xa0]"
    area = rf"(?:\+\+?)?(?:[0-9]{{2,4}}{gap})?[0-9]{{2,4}}{gap}"
    area = rf"(?:\([0-9]{{2,3}}\)[ \xa0]?|{area})"
    add(rf"{area}[0-9]{{3,4}}{gap}?[0-9]{{3,5}}", change=_phone)
    add(r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}")


def _add_marks(add: Callable[..., None]) -> None:
    """Marks, faces and brackets."""
    add(r"\"|(?i:&quot;)", change=lambda _: "''")
    add(r"(?i:&lt;)|<", change=lambda _: "<")
    add(r"(?i:&gt;)|>", change=lambda _: ">")
    add(r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]", then=r"[^A-Za-z0-9]", change=_brackets)
    add(
        r"[\^x=~<>]\.\[\^x=~<>]",
        r"[\-^x=~<>']_[\-^x=~<>']",
        r"\([\-^x=~<>'][_.]?[\-^x=~<>']\)",
        r"\([\^x=~<>']-[\^x=~<>'`]\)",
        change=_brackets,
    )
    for mark, name in _BRACKET_NAMES:
        add(re.escape(mark), change=lambda _, name=name: name)
    add(r"[()]", change=_brackets)
    add(r"-+", change=lambda text: "--" if len(text) in (3, 4) else text)
    add(r"\.{3,5}", r"(?:\.[ \xa0]){2,4}\.", r"[\x85\u2026]", change=lambda _: "...")
    add(r"@+", r"#+", r"_+", r"\*+", r"(?:\\\*){1,3}", _STOPS, r"[?!]+")


def _add_compounds(add: Callable[..., None], letter: str, plain: str) -> None:
    """Words and numbers joined by hyphens or &."""
    dotted = rf"(?:{_COUNTRIES}|[A-Za-z](?:\.[A-Za-z])+)\."
    hyphened = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{dotted}|[A-Za-z0-9\xad]+))+"
    french = rf"(?:[dDoOlL]{_QUOTES}{plain})?"
    joined = rf"{french}{plain}+(?:[-_\u058a\u2010\u2011]{french}{plain}+)*"
    capitals = r"[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
    for spelling, change in (
        (hyphened, _no_soft_hyphens),
        (joined, None),
        (capitals, _ampersand),
    ):
        add(rf"{spelling}\.", then=_STOPS, change=change)
        add(spelling, change=change)


def _add_quotes(add: Callable[..., None]) -> None:
    add("'", then=r"[A-Za-z][^ \t\n\r\xa0]", change=lambda _: "`")
    add(rf"{_QUOTE}(?:(?i:re|ve|ll)|[msdMSD])", change=quotes)
    add(rf"(?i:n){_QUOTES}(?i:t)", change=quotes)
    marks = r"[`\u2018-\u201c\u201d\u0091-\u0094\u201e\u201f\u2039\u203a\u00ab\u00bb]"
    add(_QUOTE, "''", rf"{marks}{{1,2}}", change=quotes)
    add("<<|>>")
    add(_SYMBOLS)
