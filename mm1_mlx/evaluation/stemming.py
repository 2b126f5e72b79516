"""Stems of answers, as OK-VQA's published references are stems ("riding" is "ride").

The published rule (OK-VQA v1.1, in OpenFlamingo's form) asks a part-of-speech tagger
and WordNet, which would be 50 MB of downloads. This one is ours and plain: the same
table of special words, the same singular forms, and instead of the dictionary rules of
spelling. How often both agree is measured in tests/fixtures/metrics/README.md.
"""

import re

from mm1_mlx.evaluation.samples import Sample

# Words that the published rule treats by hand (OpenFlamingo, ok_vqa_utils.py, MIT).
_PAIRS = """
adhesives:adhesive alertness:alert alpes:alp apartments:apart are:are awning:awn
backpackers:backpack badness:bad baldness:bald bases:base batter's:batter
belongings:belong blindness:blind boy's:boy braves:brave brightness:bright
browsing:brows buildings:build casings:case caves:cave charioteering:chariot
childrens:children christmas:christmas circuses:circus clothes:cloth clothing:cloth
coding:code conducter:conduct conferences:confer coniferous:conifer containers:contain
controllers:control corgie:corgi couponing:coupon creame:cream crepte:crept
cumulis:cumuli curiousity:curious dangerous:danger daughter's:daughter decorations:decor
designers:design dining:dine directions:direct domino's:domino doves:dove drives:drive
drunkenness:drunken earing:ear earnings:earn eatting:eat electicity:elect
electronics:electron elevators:elev emirates:emir expressions:express farmer's:farmer
firefighters:firefight firefighting:firefight glaced:glace gloves:glove
gondoliere:gondolier graves:grave haircutting:haircut hamburgers:hamburg hawke:hawk
hearding:heard hell's:hell hornes:horn illness:ill jeans:jean kid's:kid
kindergartener:kindergarten kiting:kite las:las leaves:leaf lenses:lens lowes:low
markings:mark married:married mating:mate meetings:meet men's:men microwaves:microwave
minerals:miner mopeds:mope morning:morn mountainous:mountain mustange:mustang
nationals:nation overseas:oversea oxygenize:oxygen paintings:paint paned:pane
paring:pare pease:peas personals:person pies:pie piping:pipe plating:plate
playfulness:play polarizing:polar police:police pooping:poop porche:porch potatoe:potato
professionals:profession projections:project propellers:propel protesters:protest
pudding:pud purring:pure quantas:quanta rabbies:rabbi raines:rain reflections:reflect
regent's:regent reminders:remind reporters:report revelations:revel riding:ride
ringe:ring ripeness:ripe rodeoing:rodeo routes:rout sadness:sad sautee:saute
scrapbooking:scrapbook settings:set shelves:shelve sickness:sick
skateboarders:skateboard smugness:smug socializing:social sometimes:sometime
staring:stare stockings:stock striping:stripe sunbathing:sunbath sunblocker:sunblock
suspenders:suspend swining:swine teasing:teas teething:teeth tenning:ten tennis:tennis
texting:text ties:tie toileting:toilet tomatoe:tomato toppings:top transitions:transit
travelers:travel travellers:travel urinating:urine vacationing:vacate vandalizers:vandal
vastness:vast vegas:vegas veteran's:veteran wading:wade walle:wall waves:wave
weddings:wed wetness:wet wilderness:wilder womens:women yes:yes
"""
_BY_HAND = {
    word: stem for word, _, stem in (pair.partition(":") for pair in _PAIRS.split())
}
_WORDS = re.compile(r"\w+(?:-\w+)*(?:'s)?|[^\w\s]")


def stem(text: str) -> str:
    """The stems of a text's words, marks parted from words: "two dogs" is "two dog"."""
    return " ".join(_stem(word) for word in _WORDS.findall(text))


def stems_of(sample: Sample) -> tuple[str, ...]:
    """The stems of OK-VQA's answers: the dataset's own (`fields["stems"]`), else ours.

    The hub's dataset has the answers alone, as people wrote them.
    """
    own = sample.fields.get("stems")
    return tuple(map(stem, sample.answers)) if own is None else own


def _stem(word: str) -> str:
    if word in _BY_HAND:
        return _BY_HAND[word]
    if word.endswith("'s"):
        return word.replace("'s", " 's")
    if word.endswith("ing"):
        return verb(word)
    return singular(word) if _is_plural(word) else word


# --- verbs ---

# Words in -ing that are no form of a verb.
_NO_VERBS = """
nothing something anything everything plaything morning ceiling earring awning sibling
offspring darling duckling dumpling sapling seedling starling herring lightning pudding
inning legging shoestring drawstring hamstring bowstring bullring during evildoing
peking beijing turing viking parasailing paragliding thanksgiving housewarming
outstanding upcoming incoming ongoing lapwing batwing forthcoming bookkeeping beekeeping
hairdressing bricklaying shipbuilding underclothing lifesaving homecoming taxpaying
trendsetting sterling kiteboarding wakeboarding gosling fledgling inkling cunning
"""
_VOWELS = "aeiouy"
_IE = {"ly": "lie", "dy": "die", "ty": "tie", "vy": "vie", "hogty": "hogtie"}
# A short stem ends in one vowel and one consonant: with two it would have doubled
# the last ("hopping"), so it lost an e ("hoping").
_SHORT = re.compile(r"^(?:[^aeiou]*|qu)[aeiouy][^aeiouywx]$")
# Others take an e after these endings: counted over WordNet's verbs.
_LONG = re.compile(
    r"(?:[cuvz]|[dr]g|[ern]s|[lp]s|[^aeiourw]l|[aeou]ng|[iy]s|[iu]at"
    r"|[^aeiou](?:[aiou]d|os|[aio]l|ul|[aiou]k|[ui][rnmb]|an|ar|ob|[aiu]g|[au]t|a[sp]))$"
)
_SINGLE = re.compile(r"(?:[uvz]|[aeiounr]c|[dr]g|[^aeiourw]l|[ernp]s|(?:ch|r)ang)$")


def verb(word: str) -> str:
    """The verb of a word in -ing, by its spelling: "riding" is "ride".

    A word without a vowel before -ing ("king", "spring") is none.
    """
    base = word[:-3]
    if word in _NO_VERBS.split() or not any(vowel in base for vowel in _VOWELS):
        return word
    if base in _IE:
        return _IE[base]
    syllables = len(re.findall(f"[{_VOWELS}]+", base))
    if len(base) > 2 and base[-1] == base[-2] and base[-1] not in _VOWELS:
        one_l = base[-1] == "l" and syllables == 1  # "call", but "control"
        keeps = base[-1] in "szf" or one_l or base in ("add", "err")
        return base if keeps else base[:-1]
    if syllables == 1:
        takes = _SINGLE.search(base) or _SHORT.search(base)
    else:
        takes = _LONG.search(base)
    return base + "e" if takes else base


# --- nouns ---

# Endings, the first that fits: those of Rails' inflector, as in the published rule.
_UNCOUNTED = re.compile(
    r"\b(?:equipment|fish|information|jeans|money|rice|series|sheep|species)$"
)
_SINGULAR = [
    (re.compile(pattern + "$"), to)
    for pattern, to in (
        (r"zombies", "zombie"),
        (r"kine", "cow"),
        (r"moves", "move"),
        (r"sexes", "sex"),
        (r"children", "child"),
        (r"men", "man"),
        (r"people", "person"),
        (r"databases", "database"),
        (r"quizzes", "quiz"),
        (r"matrices", "matrix"),
        (r"(vert|ind)ices", r"\1ex"),
        (r"passersby", "passerby"),
        (r"^oxen", "ox"),
        (r"(alias|status)(?:es)?", r"\1"),
        (r"(octop|vir)(?:us|i)", r"\1us"),
        (r"^ax[ie]s", "axis"),
        (r"(cris|test)[ie]s", r"\1is"),
        (r"shoes", "shoe"),
        (r"oes", "o"),
        (r"bus(?:es)?", "bus"),
        (r"([ml])ice", r"\1ouse"),
        (r"(x|ch|ss|sh)es", r"\1"),
        (r"movies", "movie"),
        (r"series", "series"),
        (r"([^aeiouy]|qu)ies", r"\1y"),
        (r"([lr])ves", r"\1f"),
        (r"(tive|hive)s", r"\1"),
        (r"([^f])ves", r"\1fe"),
        (r"(the|synop|progno|parenthe|diagno|ba|analy)s[ie]s", r"\1sis"),
        (r"([ti])a", r"\1um"),
        (r"news", "news"),
        (r"ss", "ss"),
        (r"s", ""),
    )
]
# What a tagger sees as a plural: -s but not of one thing, and these.
_ONE = re.compile(r"(?:ss|us|is|'s|^.{0,2})$|^(?:gas|lens|bias|yes|chess|las|texas)$")
_PLURALS = {"men", "women", "people", "children", "mice", "lice", "oxen"}


def _is_plural(word: str) -> bool:
    word = word.lower()
    if word in _PLURALS or (word.endswith(("men", "children")) and word != "men"):
        return word not in ("specimen", "abdomen", "omen", "semen", "ramen", "acumen")
    return word.endswith("s") and not _ONE.search(word)


def singular(word: str) -> str:
    """The singular of a noun by its ending: "knives" is "knife"."""
    if _UNCOUNTED.search(word):
        return word
    for pattern, to in _SINGULAR:
        if pattern.search(word):
            return pattern.sub(to, word)
    return word
