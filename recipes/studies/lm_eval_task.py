"""A task for lm-evaluation-harness that needs no download: numbers hidden in long prompts.

    python recipes/studies/lm_eval_task.py CHECKPOINT FOLDER [--length 3000] [--items 8]
    lm_eval --model hf --model_args pretrained=CHECKPOINT,trust_remote_code=True,dtype=bfloat16 \\
        --tasks hidden_number --include_path FOLDER --batch_size 1

`generate_until` asks through `generate`, so tokens are skipped; log-likelihood tasks run dense, as every pass does that
returns the logits of all positions.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

from spts_compress.calibrate import data
from spts_compress.tasks import ruler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("folder", type=Path)
parser.add_argument("--length", type=int, default=3000)
parser.add_argument("--items", type=int, default=8)
args = parser.parse_args()
data_file, task_file = (args.folder.absolute() / f"hidden_number.{suffix}" for suffix in ("jsonl", "yaml"))
for path in (data_file, task_file):
    if path.exists():
        parser.error(f"{path} exists, and would be overwritten; give another folder")

tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
prose = "\n\n".join(data.python_docs())
items = ruler.examples("niah_single_2", tokenizer, prose, args.length, args.items, seed=3, answer_tokens=32)
args.folder.mkdir(parents=True, exist_ok=True)
data_file.write_text("".join(json.dumps({"prompt": item.text, "answer": item.outputs[0]}) + "\n" for item in items))
task_file.write_text(
    f"""task: hidden_number
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data_file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: 32, do_sample: false}}
filter_list:
  - name: first_number
    filter:
      - {{function: regex, regex_pattern: "([0-9]{{7}})"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
)
print(f"{data_file}: {len(items)} prompts of at most {args.length} tokens")
