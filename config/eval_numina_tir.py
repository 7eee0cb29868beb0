# The table of the model card for the model with the tool, on top of eval_numina.py:
#     torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py config/eval_numina_tir.py
#
# The number of rounds and the time limit are the notebook's. --tir_numina=True applies all of its
# rules (docs/tools.md).

models = ["AI-MO/NuminaMath-7B-TIR"]
tir = True
tir_rounds = 4
tir_timeout = 5.0
published = {
    "NuminaMath-7B-TIR": {
        "gsm8k": 84.6,
        "math": 68.1,
        "amc23": 50.0,
        "aime24": 16.7,
        "amc23 maj@64": 77.5,
        "aime24 maj@64": 33.3,
    },
}
out_dir = "out/eval_numina_tir"
