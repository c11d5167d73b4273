"""What an answer is worth: the scoring rules of the benchmarks of Tab. 5, as pure functions of text.

benchmarks.py reads the files and applies these rules; `python evaluate.py --task NAME ...` runs both. The rules are the
public scorers' with their quirks, because numbers compare only where they were counted alike. All scores are fractions
of one, except MME's points and CIDEr-D, whose 1.0 papers print as 100.
"""
import math
import re
from collections import Counter, defaultdict

# ---------------------------------------------------------------- short answers: VQAv2, OKVQA, VizWiz, TextVQA, GQA

SIGNS = ";/[]\"{}()=+\\_-><@`,?!"
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
WHOLE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
# The public table maps each of these words with one apostrophe left out to the word, and one word the wrong way round.
# Its other entries change nothing: some have a capital I, which no lower-case text has, some map a word to itself.
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in WHOLE.split() for i, sign in enumerate(word) if sign == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


def tidy(text):
    """The VQA server's normal form: punctuation, number words, articles, contractions.

    Its quirks: a sign vanishes where it touches a blank anywhere in the text, and all signs do where a comma stands
    between digits; otherwise they become blanks ("t-shirt" -> "t shirt"). A period goes unless a digit follows it, but
    only the first 32 do.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number, out = re.search(r"\d,+\d", text), text
    for sign in SIGNS:
        out = out.replace(sign, "" if number or f"{sign} " in text or f" {sign}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    found = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ARTICLES)


def normalise(text):
    """tidy, once commas and question marks are gone and 's stands apart: what is submitted, and what the local scorers
    of TextVQA, OKVQA and VizWiz compare"""
    return tidy(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(answer, truths, official=False):
    """The mean over all ways to leave one human out of min(1, matches among the others / 3): with ten humans 0, .3, .6,
    .9, 1 for 0, 1, 2, 3 and more matches. official: as VQAv2's server, which tidies the humans' answers only where they
    differ."""
    said = normalise(answer)
    if not official:
        truths = [normalise(truth) for truth in truths]
    elif len({truth.strip() for truth in truths}) > 1:
        said, truths = tidy(said), [tidy(truth) for truth in truths]
    same, n = sum(truth.strip() == said for truth in truths), len(truths)
    return (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n if same else 0.0


def gqa_form(answer):
    return answer.strip().rstrip(".").lower()


def gqa_match(answer, truth):
    return gqa_form(answer) == truth.lower()


# ---------------------------------------------------------------- captions

CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))\b")
TOKEN = re.compile(r"""n't\b | '(?:s|m|d|ll|re|ve)\b                # what CLITIC has set apart
                       | (?:[^\W\d]\.){2,}                          # u.s., a.m.
                       | \w+ (?: (?:[-'] | (?<=\d)[.,:/](?=\d)) \w+ )*  # black-and-white, o'clock, 3.5, 10:30
                       | \S""", re.VERBOSE)
DROPPED = set("'`\".?!,:-;")


def words(caption):
    """The tokens of a caption in the style of the Penn Treebank: lower case, n't and 's apart, no punctuation.

    The public scorers run Stanford's tokenizer (Java). What it does otherwise: abbreviations (mr., st.) keep their
    period; web addresses, e-mail addresses and smileys stay whole; "d'ye", "more'n", "'tis" and "'twas" come apart;
    brackets are spelt -lrb- and -rrb-, which changes no count.
    """
    text = re.sub("[\u2018\u2019]", "'", re.sub("[\u2013\u2014\u201c\u201d\u2026]", " ", caption.lower()))
    text = re.sub(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))", r"\1 ", text)
    return [token for token in TOKEN.findall(CLITIC.sub(r" \1", text)) if token not in DROPPED]


def ngrams(caption):
    tokens = words(caption)
    return Counter(tuple(tokens[i:i + n]) for n in (1, 2, 3, 4) for i in range(len(tokens) - n + 1))


def cider(captions, references):
    """CIDEr-D (Vedantam et al.): for n = 1..4 the cosine between the tf-idf of a caption's n-grams, clipped to the
    reference's, and the reference's, damped by a Gaussian (sigma 6) of the difference in length; the mean over n and
    over references, times 10. Document frequencies are those of the references given.

    captions: a text an image; references: texts of each image, at least one -> a score an image.
    One image alone scores 0, for its n-grams are in every document.
    """
    given = [[ngrams(text) for text in texts] for texts in references]
    seen = Counter(gram for group in given for gram in set().union(*group))

    def weigh(counts):
        vectors = [{}, {}, {}, {}]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * math.log(len(given) / max(1, seen[gram]))
        norms = [math.sqrt(sum(weight ** 2 for weight in vector.values())) for vector in vectors]
        return vectors, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    def similarity(told, truth):
        (vectors, norms, length), (others, other_norms, other_length) = told, truth
        total = 0
        for a, b, norm in zip(vectors, others, map(math.prod, zip(norms, other_norms))):
            if norm:
                total += sum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b) / norm
        return total / 4 * math.exp(-(length - other_length) ** 2 / (2 * 6 ** 2))

    scores = []
    for caption, group in zip(captions, given, strict=True):
        told = weigh(ngrams(caption))
        scores.append(10 * sum(similarity(told, weigh(counts)) for counts in group) / len(group))
    return scores


# ---------------------------------------------------------------- yes or no

def pope_says(answer):
    """no where the first sentence, without commas, has one of the words No, not, no between blanks; else yes"""
    return "no" if {"No", "not", "no"} & set(answer.split(".")[0].replace(",", "").split(" ")) else "yes"


def pope(answers, truths):
    """answers: texts, truths: yes or no -> accuracy; precision, recall and F1 of yes; how often yes was said"""
    said = [pope_says(answer) == "yes" for answer in answers]
    truth = [label == "yes" for label in truths]
    hits = sum(a and b for a, b in zip(said, truth, strict=True))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(truth))
    return {"accuracy": sum(a == b for a, b in zip(said, truth)) / len(truth), "precision": precision, "recall": recall,
            "F1": 2 * precision * recall / (precision + recall) if hits else 0.0, "yes": sum(said) / len(said)}


PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def mme_says(answer):
    """yes or else no, as found in the first four characters in lower case; None is what MME counts as other"""
    return next((word for word in ("yes", "no") if word in answer.lower()[:4]), None)


def mme(answers, truths, tasks):
    """100 * acc + 100 * acc+ a task, where acc+ wants both questions about a picture right; those two are neighbours.

    answers: texts, truths: yes or no, tasks: names -> {perception (of 2000), cognition (of 800), then the points, acc
    and acc+ of each task}
    """
    hits = defaultdict(list)
    for answer, truth, task in zip(answers, truths, tasks, strict=True):
        hits[task].append(mme_says(answer) == truth)
    parts = {"perception": 0.0, "cognition": 0.0}
    for task, right in hits.items():
        acc, both = sum(right) / len(right), sum(map(all, zip(right[::2], right[1::2]))) / len(right[::2])
        parts |= {task: 100 * acc + 100 * both, f"{task} acc": acc, f"{task} acc+": both}
        parts["cognition" if task in COGNITION else "perception"] += parts[task]
    return parts


# ---------------------------------------------------------------- one of {letter: text}; None where no letter is found

def option_letter(answer, choices):
    """MMBench: the one letter that stands alone in the answer; else the one choice whose text is in the answer"""
    tokens = set(re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split())
    found = [letter for letter in choices if letter in tokens]
    if len(found) != 1:
        found = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def exact_letter(answer, choices):
    """SEED: the letter and nothing else"""
    return answer.strip() if answer.strip() in choices else None


def scienceqa_letter(answer, choices):
    """ScienceQA: the letter; "B. ..."; or one "The answer is B." in the text, where any character may follow the B"""
    found = re.findall(r"The answer is ([A-Z]).", answer)
    if answer in choices or re.match(r"[A-E]\. ", answer):
        found = [answer[0]]
    return found[0] if len(found) == 1 and found[0] in choices else None


def bracket_letter(answer, choices):
    """MMVP, where the paper asks GPT-4: the one letter in brackets; else the letter that the answer is, or begins with
    before a period, colon or bracket; else the one choice whose text is in the answer"""
    answer = answer.strip().lower()
    found = set(re.findall(r"\((\w)\)", answer) or re.findall(r"^(\w)(?:$|[.:)])", answer))
    found = found or {letter for letter, text in choices.items() if text.lower() in answer}
    return found.pop() if len(found) == 1 and found <= set(choices) else None


def together(hits, groups):
    """A group is right if all its members are (MMBench's rotations, MMVP's pairs) -> {group: bool}, in order"""
    right = {}
    for hit, group in zip(hits, groups, strict=True):
        right[group] = right.get(group, True) and hit
    return right


# ---------------------------------------------------------------- a file's score: items as benchmarks.py reads them

def result(metric, items, values, unparsed=0):
    """The mean of the values, as parts the means of each kind -> {score, metric, parts, unparsed}"""
    parts = defaultdict(list)
    for item, value in zip(items, values, strict=True):
        for kind in item["kinds"]:
            parts[kind].append(value)
    return {"score": sum(values) / len(values), "metric": metric, "unparsed": unparsed,
            "parts": {kind: sum(some) / len(some) for kind, some in sorted(parts.items())}}


def score_each(metric, rule, items, answers):
    return result(metric, items, [float(rule(answer, item["truth"])) for item, answer in zip(items, answers)])


def score_captions(items, answers):
    """A part (a domain of NoCaps) counts as a file of its own, with its own document frequencies."""
    total = result("CIDEr-D", items, cider(answers, [item["truth"] for item in items]))
    for kind in total["parts"]:
        some = [(answer, item["truth"]) for item, answer in zip(items, answers) if kind in item["kinds"]]
        total["parts"][kind] = sum(cider(*zip(*some))) / len(some)
    return total


def score_pope(items, answers):
    parts = pope(answers, [item["truth"] for item in items])
    return {"score": parts["F1"], "metric": "F1", "parts": parts, "unparsed": 0}


def score_mme(items, answers):
    parts = mme(answers, [item["truth"] for item in items], [item["kinds"][0] for item in items])
    return {"score": parts["perception"], "metric": "perception, of 2000 points", "parts": parts,
            "unparsed": sum(mme_says(answer) is None for answer in answers)}


def score_choices(metric, rule, items, answers):
    """By group where the items have one; the part `each` is then the share of the single items."""
    letters = [rule(answer, item["choices"]) for item, answer in zip(items, answers)]
    hits = [letter == item["truth"] for item, letter in zip(items, letters)]
    groups = [item.get("group", number) for number, item in enumerate(items)]
    right, members = together(hits, groups), dict(zip(groups, items))
    total = result(metric, list(members.values()), list(right.values()), letters.count(None))
    if len(members) < len(items):
        total["parts"]["each"] = sum(hits) / len(hits)
    return total


def average(results):
    """The mean of the results of several files (POPE's three)"""
    mean = lambda values: sum(values) / len(values)
    return results[0] | {"score": mean([one["score"] for one in results]),
                         "parts": {name: mean([one["parts"][name] for one in results]) for name in results[0]["parts"]},
                         "unparsed": sum(one["unparsed"] for one in results)}
