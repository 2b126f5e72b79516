"""Strings that break parsers: what the metrics are compared with the references on."""

import random
import re

# Pieces of captions, answers and signs, each with a rule of its own somewhere.
_VISIBLE = """
a the man woman dog's dogs' isn't can't I'm we've they'd o'clock y'all rock'n'roll
ma'am cannot gonna gotta wanna lemme gimme 'twas 'tis 'em 'til Cap'n d'Artagnan l'eau
c'est O'Brien Shi'ite don't wasn’t it’s ‘quoted’ “double” «guillemets» U.S. U.K. e.g.
i.e. etc. Inc. Co. Corp. Ltd. St. Mr. Mrs. Dr. vs. No. no. fig. p.m. a.m. P.M. I. A.
B. Ph.D. Jan. Sept. Mon. Ave. Blvd. Jr. Sr. Mass. mass. Miss. wash. ill. pa. la. co-ed
T-shirt x-ray well-known twenty-one 3-year-old mother-in-law anti-war pro-life S&P-500
AT&T A&W R&B b&b black&white and/or 1/2 3/4 24/7 9/11 12/25/2014 2014-01-02 1,000
1,000,000 3.14 .5 -5 +7 10:30 3:30pm 5pm 100% $5 $5.00 US$10 €3 £5 ¥100 ¢5 #1 #tag
@user 555-1234 (415) +1 1-800-555-1234 415.555.1234 www.foo.com http://a.b/c?d=e
https://x.org/y. foo.com bar.co.uk nba.com/x foo@bar.com <a@b.c> file.txt a.jpg main.c
... .. .... ..... … -- --- ---- - – — _ __ * ** / \\ | ~ ^ = + % & &amp; &lt; &gt;
&quot; &apos; &nbsp; &mdash; &#39; &eacute; ( ) [ ] { } < > << >> <b> </b> <br/> <!--
--> :) :-) ;) :( =D :P <3 (^_^) ^_^ -_- o_O ! !! ? ?! ??? , ; : ' '' ` `` " ½ ¼ ⅓ ² x²
H₂O 20°C ° © ® ™ • · × ÷ ± § ¶ ¿ ¡ é café naïve Łódź straße 日本語 привет مرحبا १२३
😀 👍🏽 5'10" 6ft. 1960's '60s '99 90s c++ C# F# i.e e.g a.k.a. D.C. N.Y. J.R.R. N.B.A
New$ 4x4 2nd B-52 747-400 iPod's x's 7-up Coca-Cola coca.cola Wal*Mart @@ ## $$ ,, ;; ::
hi.there Hello.World stop!go what?no ca. op. 5 pp. pty. ltd. co. ltd art. 3 Dept. est.
1990 tel. sq. ft. Gov. Prof. Sgt. Capt. Gen. Alex. Mt. Ft. ste. The He She In It You
This z. U.S.-U.K. non-U.S. 3D 3-D -LRB- -RRB- Cos. PT. Pte. 'cause cont'd s'mores
nor'easter li'l ol' somethin' Dunkin' 'n' d' hasn'tn't n't 's 're 've N'T CAN'T It'S
zero One two TEN none an dont wont youre somebody'd y'alld've ow's'at thats isnt's yes
Yes. No, not y n (A) (B) B. C: D) answer is 12 = -3 1e5 1.5e-3 1,234.5 [1,2] [3] inf
nan 0 0.0 50% 12% 1_000 Question Answer Short Output
"""
PIECES = [
    *_VISIBLE.split(),
    *("\u00a0", "\u200b", "\u3000", "soft\u00adhyphen", "\ufeff", "\t"),
]
_SENTENCE = (
    "a man in grey riding the small wooden boat on top of water near people with two "
    "dogs and an old red bus"
)
_MARKS = ".,'\"-!?:;&/()<>@#$%*_+=[]{}|\\~^`’‘“”…–— "
_SHORT = "abcdefgAEIO0123456789 tsnmdlvre"
_ENDS = (".", "", "", " .", "!", "...", "?")


def captions(count: int, seed: int = 0) -> list[str]:
    """Sentences as people write them, with an odd piece in most of them."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        words = dice.choices(_SENTENCE.split(), k=dice.randint(4, 14))
        for _ in range(dice.randint(0, 2)):
            words[dice.randrange(len(words))] = dice.choice(PIECES)
        text = " ".join(words)
        text = text.capitalize() if dice.random() < 0.7 else text
        found.append(text + dice.choice(_ENDS))
    return found


def odd(count: int, seed: int = 0) -> list[str]:
    """Odd pieces in a row, random marks, random characters; some are empty."""
    dice = random.Random(seed)
    found = ["", " ", "  a  ", "."]
    while len(found) < count:
        kind = dice.random()
        if kind < 0.5:
            glue = [" "] * 7 + ["", ". ", ", ", "-", "/", "."]
            pieces = dice.choices(PIECES, k=dice.randint(1, 9))
            text = "".join(piece + dice.choice(glue) for piece in pieces)
        elif kind < 0.75:
            text = "".join(
                dice.choice(_MARKS if dice.random() < 0.35 else _SHORT)
                for _ in range(dice.randint(1, 25))
            )
        elif kind < 0.9:
            codes = (dice.randrange(32, 127) for _ in range(dice.randint(1, 30)))
            text = "".join(map(chr, codes))
        else:
            ranges = ((0x80, 0x250), (0x390, 0x450), (0x2000, 0x2C00), (32, 127))
            codes = (dice.randrange(*dice.choice(ranges)) for _ in range(8))
            text = "".join(map(chr, codes))
        found.append(re.sub("[\n\r\x0b\x0c\x85\u2028\u2029]", " ", text))
    return found[:count]
