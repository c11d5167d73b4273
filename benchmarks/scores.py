"""The scoring rules of the benchmarks of Tab. 5, as functions of text: those of the public scorers, quirks included,
because only numbers that were counted alike can be compared. All scores are fractions of one, except MME's points and
CIDEr-D, whose 1.0 papers print as 100."""
import re
from collections import defaultdict

from common.weights import UserError


def mean(values):
    return sum(values) / len(values)


def summarize(metric, items, values, unparsed=0):
    """The mean of the values, and for each kind of item the mean over its items -> {score, metric, unparsed, parts}"""
    by_kind = defaultdict(list)
    for item, value in zip(items, values, strict=True):
        for kind in item["kinds"]:
            by_kind[kind].append(value)
    return {"score": mean(values), "metric": metric, "unparsed": unparsed,
            "parts": {kind: mean(of_kind) for kind, of_kind in sorted(by_kind.items())}}


def score_each(metric, rule, items, answers):
    return summarize(metric, items, [float(rule(answer, item["truth"])) for item, answer in zip(items, answers)])


def average(results):
    """The mean of the results of several files (POPE's three), and the sums of what was counted, without the answers"""
    unscored = [result for result in results if result["score"] is None]
    first = {name: value for name, value in (unscored or results)[0].items() if name != "answers"}
    whole = first | {name: sum(result[name] for result in results)
                     for name in ("unparsed", "answered", "cut", "seconds") if name in first}
    if unscored:
        return whole
    parts = {name: mean([result["parts"][name] for result in results]) for name in results[0]["parts"]}
    return whole | {"score": mean([result["score"] for result in results]), "parts": parts}


# ---------------------------------------------------------------- short answers: VQAv2, OKVQA, VizWiz, TextVQA, GQA

PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
# The public table maps each of these words with one apostrophe left out to the word, and one word the wrong way round.
# Its other entries have no effect: some have a capital I, which no lower-case text has, some map a word to itself.
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in CONTRACTED.split() for i, c in enumerate(word) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


def server_normalise(text):
    """The VQA server's normal form: punctuation, number words, articles, contractions. Its quirks: a sign is deleted if
    it touches a blank anywhere in the text, and every sign is if the text has a comma between digits; otherwise it
    becomes a blank ("t-shirt" -> "t shirt"). Periods not before a digit are deleted, but only the first 32."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number, result = re.search(r"\d,+\d", text), text
    for sign in PUNCTUATION:
        delete = has_number or f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if delete else " ")
    result = re.sub(r"\.(?!\d)", "", result, count=32)
    tokens = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in tokens if word not in ARTICLES)


def normalise(text):
    """server_normalise after deleting commas and question marks and splitting off 's: the form of a submission, and the
    one that the local scorers of TextVQA, OKVQA and VizWiz compare"""
    return server_normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(answer, truths, official=False):
    """The mean of min(1, matches / 3) over all ways to leave out one human: with ten humans 0, .3, .6, .9, 1 for 0, 1,
    2, 3, 4 or more matches. official: as VQAv2's server, which normalises the humans' answers only if they differ."""
    prediction = normalise(answer)
    if not official:
        truths = [normalise(truth) for truth in truths]
    elif len({truth.strip() for truth in truths}) > 1:
        prediction, truths = server_normalise(prediction), [server_normalise(truth) for truth in truths]
    matches, n = sum(truth.strip() == prediction for truth in truths), len(truths)
    return (matches * min(1, (matches - 1) / 3) + (n - matches) * min(1, matches / 3)) / n


def gqa_normalise(answer):
    return answer.strip().rstrip(".").lower()


def gqa_match(answer, truth):
    return gqa_normalise(answer) == truth.lower()


# ---------------------------------------------------------------- captions: NoCaps, Flickr30k, COCO

CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve|em))\b|(?<=\w)('n(?:'|\b))", re.IGNORECASE)
COMPOUND = re.compile(r"\b(can(?=not\b)|(?:gon|wan)(?=na(?![\w-]))|got(?=ta\b)|(?:gim|lem)(?=me\b))", re.IGNORECASE)
TOKEN = re.compile(r"""n't\b | '(?:s|m|d|ll|re|ve)\b                # contractions, already split off
    | 'n(?:'|\b) | '(?:em|til|till|cause|\d\ds?)\b | 't(?=is|was) | y'(?=\w) | ol'
    | (?:mrs?|ms|[djs]r|st|mt|vs|etc|ave|blvd|co|corp|inc|ltd)\.      # abbreviations
    | (?:[^\W\d]\.){2,}                                             # u.s., a.m.
    | (?-i: [A-Z]+ (?: & [A-Z]+ )+ )                                 # AT&T
    | [a-z][a-z\d]*(?:-[a-z\d]+)* (?: / [a-z\d]+(?:-[a-z\d]+)* ){1,2} (?!'?\w)      # black/white
    | \w+ (?: (?:[-'] | (?<=\d)[.,:/](?=\d)) \w+ )*                 # black-and-white, o'clock, 3.5, 10:30
    | [?!]{2,} | \S""", re.VERBOSE | re.IGNORECASE)
IGNORED_TOKENS = set("'`\".?!,:-;")


def caption_tokens(caption):
    """The tokens of a caption in the style of the Penn Treebank: lower case, n't and 's split off, no punctuation. The
    public scorers run Stanford's tokenizer (Java), which differs: less common abbreviations keep their period; web
    addresses, e-mail addresses and smileys stay whole; brackets become -lrb- and -rrb-, which changes no count."""
    text = re.sub("[\u200d\ufe0f\U00010000-\U0010ffff]", " ", caption)          # emoji, which the public one drops
    text = re.sub("[\u2018\u2019]", "'", re.sub("[\u2013\u2014\u201c\u201d\u2026]", " ", text))
    tokens = TOKEN.findall(CONTRACTION.sub(r" \1\2", COMPOUND.sub(r"\1 ", text)))
    return [token.lower() for token in tokens if token not in IGNORED_TOKENS]


def cider(captions, references):
    """CIDEr-D (Vedantam et al.) by the public scorer. captions: a text for each image; references: a list of texts for
    each image -> a score for each image. Document frequencies are those of the references: one image alone scores 0."""
    references = {n: [" ".join(caption_tokens(text)) for text in texts] for n, texts in enumerate(references)}
    captions = {n: [" ".join(caption_tokens(caption))] for n, caption in enumerate(captions)}
    if not any(text for texts in references.values() for text in texts):
        raise UserError("none of the captions in --data has a word: there is nothing to compare the answers with")
    return import_cider()().compute_score(references, captions)[1].tolist()


def import_cider():
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise UserError("captions are scored by the package pycocoevalcap, which is not installed: "
                        "pip install pycocoevalcap") from None
    return Cider


def score_captions(items, answers):
    """Each part (a domain of NoCaps) is scored like a file of its own, with its own document frequencies."""
    result = summarize("CIDEr-D", items, cider(answers, [item["truth"] for item in items]))
    for kind in result["parts"]:
        pairs = [(answer, item["truth"]) for item, answer in zip(items, answers) if kind in item["kinds"]]
        result["parts"][kind] = mean(cider(*zip(*pairs)))
    return result


# ---------------------------------------------------------------- yes or no: POPE, MME

def pope_label(answer):
    """no if the first sentence, without commas, has one of the words No, not, no between blanks; else yes"""
    return "no" if {"No", "not", "no"} & set(answer.split(".")[0].replace(",", "").split(" ")) else "yes"


def score_pope(items, answers):
    """F1 of yes; parts: accuracy, precision, recall and F1 of yes, and the share of answers that are yes"""
    predicted = [pope_label(answer) == "yes" for answer in answers]
    labels = [item["truth"] == "yes" for item in items]
    true_positives = sum(a and b for a, b in zip(predicted, labels, strict=True))
    precision, recall = true_positives / max(1, sum(predicted)), true_positives / max(1, sum(labels))
    f1 = 2 * precision * recall / (precision + recall) if true_positives else 0.0
    parts = {"accuracy": mean([a == b for a, b in zip(predicted, labels)]), "precision": precision, "recall": recall,
             "F1": f1, "yes": mean(predicted)}
    return {"score": f1, "metric": "F1", "parts": parts, "unparsed": 0}


PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def mme_label(answer):
    """yes or else no, if in the first four characters in lower case; None is what MME counts as other"""
    return next((label for label in ("yes", "no") if label in answer.lower()[:4]), None)


def score_mme(items, answers):
    """100 * acc + 100 * acc+ points for each task; acc+ is the share of pictures with both questions right. Parts: the
    sums (at most 2000 and 800), then points, acc, acc+ by task."""
    labels = [mme_label(answer) for answer in answers]
    hits = defaultdict(lambda: defaultdict(list))                             # {task: {picture: [right or not]}}
    for number, (item, label) in enumerate(zip(items, labels, strict=True)):
        hits[item["kinds"][0]][item.get("group", number // 2)].append(label == item["truth"])
    parts = {"perception": 0.0, "cognition": 0.0}
    for task, pictures in hits.items():
        acc, acc_plus = mean(sum(pictures.values(), [])), mean([all(both) for both in pictures.values()])
        parts |= {task: 100 * acc + 100 * acc_plus, f"{task} acc": acc, f"{task} acc+": acc_plus}
        parts["cognition" if task in COGNITION else "perception"] += parts[task]
    return {"score": parts["perception"], "metric": "perception, of 2000 points", "parts": parts,
            "unparsed": labels.count(None)}


# ---------------------------------------------------------------- multiple choice; a rule -> the letter or None

def mmbench_letter(answer, choices):
    """MMBench: the one letter that is a word of the answer; else the one choice whose text is in the answer"""
    tokens = set(re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split())
    found = [letter for letter in choices if letter in tokens]
    if len(found) != 1:
        found = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def seed_letter(answer, choices):
    """SEED: the letter and nothing else"""
    return answer.strip() if answer.strip() in choices else None


def scienceqa_letter(answer, choices):
    """ScienceQA: the letter; "B. ..."; or one "The answer is B." in the text, where any character may follow the B"""
    found = re.findall(r"The answer is ([A-Z]).", answer)
    if answer in choices or re.match(r"[A-E]\. ", answer):
        found = [answer[0]]
    return found[0] if len(found) == 1 and found[0] in choices else None


def mmvp_letter(answer, choices):
    """MMVP, where the paper asks GPT-4: the one letter in brackets; else the letter that is the answer, or begins it
    before a period, colon or bracket; else the one choice whose text is in the answer"""
    answer = answer.strip().lower()
    found = set(re.findall(r"\((\w)\)", answer) or re.findall(r"^(\w)(?:$|[.:)])", answer))
    found = found or {letter for letter, text in choices.items() if text.lower() in answer}
    return found.pop() if len(found) == 1 and found <= set(choices) else None


def score_choices(metric, find_letter, items, answers):
    """Items of one `group` (MMBench's rotations, MMVP's pairs) count as one, right if all of them are; the part `each`
    is then the share of single items that are right."""
    letters = [find_letter(answer, item["choices"]) for item, answer in zip(items, answers, strict=True)]
    hits = [letter == item["truth"] for item, letter in zip(items, letters)]
    groups = [item.get("group", number) for number, item in enumerate(items)]
    group_items, wrong = dict(zip(groups, items)), {group for group, hit in zip(groups, hits) if not hit}
    result = summarize(metric, group_items.values(), [group not in wrong for group in group_items], letters.count(None))
    if len(group_items) < len(items):
        result["parts"]["each"] = mean(hits)
    return result
