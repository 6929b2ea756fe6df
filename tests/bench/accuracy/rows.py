"""What the accuracy harness measures: models, texts, formats and methods, as plain tables.

A new method is one row of METHODS. Its `steps` are command lines of pare, one after the other; what a word in braces
stands for:
  {model}        the original folder              {out}      the folder that this step writes, one per step
  {previous}     what the step before it wrote    {codec}    the format's words, such as --codec q4g32
  {calibrate}    --text CALIBRATION --samples N --seed S   (the seed of the run)
  {tuning}       the tuning text, a .jsonl file   {seed}     the seed of the run
A row whose steps use {calibrate} or {seed} is run once per seed, any other once. The last step's folder is exported to
a compact file, and that file is scored.
"""

# The words of a format. Everything outside the blocks' linears is alike in all of them: embedding and head in q8.
FORMATS = {
    "q4g32": ["--codec", "q4g32"],
    "q4g128": ["--codec", "q4g128"],
    "q4ag32": ["--codec", "q4ag32"],
    "q4mg32": ["--codec", "q4mg32"],
    "q3g32": ["--codec", "q3g32"],
    "q8": ["--codec", "q8"],
    "q8c": ["--codec", "q8c"],
    "w8a8": ["--codec", "w8a8"],
}
DEFAULT_FORMATS = ["q4g32", "q4g128", "q4ag32"]


def quantize(*words):
    return {"steps": [["quantize", "--model", "{model}", "--out", "{out}", "{codec}", *words]]}


Q4 = ["q4g32", "q4g128"]


# name -> {"steps": ..., "formats": [...] and "models": [...] where not all}. The order is that of the tables. No 4.5 bits
# for stories260K: part of its matrices is too narrow for groups, and codes of 8 bits there leave 4.6 at least.
METHODS = {
    "rtn-absmax": quantize("--method", "rtn-absmax"),
    "rtn-q4_0": quantize("--method", "rtn-q4_0") | {"formats": Q4},
    "rtn-imatrix": quantize("--method", "rtn-imatrix", "{calibrate}") | {"formats": Q4},
    "rtn": quantize("--method", "rtn", "{calibrate}"),
    "awq": quantize("--method", "rtn", "--equalize", "awq", "{calibrate}") | {"formats": Q4 + ["q3g32"]},
    "gptq": quantize("--method", "gptq", "{calibrate}"),
    "gptq, SmoothQuant": quantize("--equalize", "smoothquant", "{calibrate}") | {"formats": ["w8a8"]},
    "gptq, least noise": quantize("--equalize", "least-noise", "{calibrate}") | {"formats": ["w8a8"]},
    "gptq, Fisher": quantize("{calibrate}", "--fisher") | {"formats": ["q4g32"]},
    "gptq, re-targeted": quantize("{calibrate}", "--preset", "balanced"),
    "gptq, re-targeted, least noise": quantize("{calibrate}", "--retarget", "--equalize", "least-noise")
                                      | {"formats": ["w8a8"]},
    "gptq, re-targeted, Fisher": quantize("{calibrate}", "--retarget", "--fisher") | {"formats": ["q4g32", "q3g32"]},
    "same, scales tuned": quantize("{calibrate}", "--retarget", "--fisher", "--tune", "300", "--tune-batch", "4",
                                   "--tune-lr", "0.002", "--tune-text", "{tuning}") | {"formats": ["q4g32"]},
    # What the steps of tuning codes bring: a tenth, two fifths and all of the preset's.
    "best, 300 steps": quantize("{calibrate}", "--preset", "best", "--tune-codes", "300", "--tune-text", "{tuning}") |
                       {"formats": ["q4g32"]},
    "best, 1,200 steps": quantize("{calibrate}", "--preset", "best", "--tune-codes", "1200", "--tune-text", "{tuning}")
                         | {"formats": ["q4g32"]},
    "best": quantize("{calibrate}", "--preset", "best", "--tune-text", "{tuning}") |
            {"formats": ["q4g32", "q4mg32", "q3g32"]},
    "gptq, re-targeted, --bits 4.5": quantize("{calibrate}", "--retarget", "--bits", "4.5")
                                      | {"formats": ["q4g32"], "models": ["teacher", "novels-20m"]},
}

# The method and format that "gap closed" counts from.
BASELINE = ("q4g32", "rtn-q4_0")

# Places are relative to the repository. `corpus` is a row of corpora.CORPORA, `tests` are texts of it: the first is in
# the domain of the training text.
MODELS = {
    "teacher": {"folder": "examples/teacher", "corpus": "manual and novels",
                "tests": ["manual", "novels", "stories", "wikitext"]},
    "stories260K": {"folder": "../shared/models/stories260K", "corpus": "stories",
                    "tests": ["stories", "novels", "wikitext"]},
    "novels-20m": {"folder": "examples/models/novels-20m", "corpus": "manual and novels",
                   "tests": ["novels", "manual", "stories", "wikitext"]},
}
DOMAIN = {"teacher": ["manual", "novels"], "stories260K": ["stories"], "novels-20m": ["novels"]}

# What the tables of differences subtract from every other method of the same format.
REFERENCES = ["rtn-q4_0", "gptq"]
