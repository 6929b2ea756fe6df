"""WinoGrande as lm-evaluation-harness asks it: the choices are contexts, what follows the gap is scored."""


def gold(doc):
    return doc["label"]


def rest(doc):
    return doc["sentence"][doc["sentence"].index("_") + 1 :].strip()


def contexts(doc):
    gap = doc["sentence"].index("_")
    return [doc["sentence"][:gap] + doc[key] for key in ("option1", "option2")]
