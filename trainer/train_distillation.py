"""Distillation: a small student learns from all probabilities of a teacher, not only from the tokens of the data.

At each target token t of the step the loss is (1 - alpha) * -log q(t) + alpha * D(p, q), with the student's distribution
q and the teacher's p, divided by the number of targets. What the teacher holds for nearly as likely says how words and
answers are related, which one token does not (Hinton et al. 2015, eq. 4 ff.). --divergence chooses D: see
distillation_losses.py for the equations of forward KL, reverse KL and the generalised Jensen-Shannon divergence. In data
the student sees only what it has not written itself; with --on_policy_share S, that share of the rows has its last
answer replaced by one that the student samples now, and the teacher says token by token what should have come (Agarwal
et al. 2024, algorithm 1; no cross entropy there: nobody says that these answers are right).

    python trainer/train_distillation.py --teacher out/quickstart/full_sft_tiny --hidden_size 96 --num_hidden_layers 3 \\
        --optimizer muon --batch_size 1 --alpha 1
    python trainer/train_distillation.py --teacher full_sft_minimind2 --preset minimind2-small --data_path my.jsonl
    python trainer/train_distillation.py --teacher out/quickstart/full_sft_tiny --from_weight out/distillation_96x3 \\
        --save_weight on_policy --on_policy_share 0.5 --divergence jsd --alpha 1

The first takes a minute or two on a CPU, on the toy world, after scripts/quickstart.py. The teacher is any network of ours,
dense or a mixture of experts, of any size, with the student's very tokenizer: probabilities are compared token by token.
A teacher of another tokenizer, or one behind a server, teaches by its answers: scripts/make_teacher_rows.py writes them as
rows, and train_full_sft.py learns from those (black-box or sequence-level distillation: Kim & Rush 2016).

What to expect: the student's held-out bits per byte, printed beside the teacher's, are below those of the same network
trained on the same rows alone (train_full_sft.py), where those are few: by 14% in scripts/ladder.py, while the share of right
answers does not change. With all rows of the toy world little is gained. Be careful with --temperature above 1: it lifts
thousands of tokens that a sure teacher holds for impossible, and a small student then learns those before the answer.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from dataset.inspect_rows import show_rows
from dataset.lm_dataset import SFTDataset
from dataset.packing import IGNORE, PackedBatches, collate, pack
from dataset.token_cache import fingerprint
from dataset.toy_world import write_world
from model.engine import Engine
from model.model_minimind import PRESETS
from model.native_format import network_sha256
from model.sampling import SamplingParams
from trainer.arguments import TrainArgs, arg, check_positive, check_share, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.distillation_losses import distillation_sums
from trainer.evaluation import bits_per_byte, validate, validation_sets
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.run import Run
from trainer.sharding import read_config
from trainer.steps import count_targets, step_batches
from trainer.weights import SHAPE_FLAGS, load_model, read_weight, run_folder

TOY = ROOT / "dataset" / "toy_mini"


@dataclass
class DistillationArgs(TrainArgs):
    data_path: list[str] = arg([], "rows of conversations; FILE@0.4 takes that share of them (default: the toy world)",
                               nargs="+")
    save_weight: str = arg("distillation", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    learning_rate: float = arg(2e-3, "peak learning rate")
    teacher: str = arg("full_sft", "learn from this run (a name in SAVE_DIR), checkpoint folder or .pth file")
    teacher_preset: str = arg("", "which of the runs of that name is the teacher; for a .pth file, its shape",
                              choices=list(PRESETS))
    teacher_hidden_size: int | None = arg(None, "width of the teacher, in place of the preset's")
    teacher_num_hidden_layers: int | None = arg(None, "layers of the teacher, in place of the preset's")
    teacher_use_moe: bool = arg(False, "the teacher is a mixture of 4 experts, in place of the preset's feed-forward")
    divergence: str = arg("forward_kl", "how the student's distribution is compared with the teacher's",
                          choices=["forward_kl", "reverse_kl", "jsd"])
    jsd_beta: float = arg(0.5, "jsd: the teacher's share of the mixture that both are compared with; 0: forward, 1: reverse KL")
    temperature: float = arg(1.0, "both logits are divided by it before they are compared: above 1, unlikely tokens count more")
    alpha: float = arg(0.9, "weight of the divergence; the cross entropy with the data's tokens has the rest")
    on_policy_share: float = arg(0.0, "share of the rows whose last answer is sampled from the student itself, in each step")
    max_new_tokens: int = arg(128, "on_policy_share: longest answer, in tokens")
    chunk_size: int = arg(1024, "target positions whose logits are in memory at a time")

    FREE = (*TrainArgs.FREE, "chunk_size")

    def check(self):
        """TrainArgs.check; the ranges of this stage's flags, and those that would have no effect."""
        super().check()
        check_positive(self, "temperature", "max_new_tokens", "chunk_size", "teacher_hidden_size", "teacher_num_hidden_layers")
        check_share(self, "jsd_beta", "alpha", "on_policy_share")
        if "jsd_beta" in self.given and self.divergence != "jsd":
            raise ValueError("--jsd_beta has an effect with --divergence jsd only: leave it out, or choose jsd")
        if "max_new_tokens" in self.given and not self.on_policy_share:
            raise ValueError("--max_new_tokens has an effect with --on_policy_share only: leave it out, or give a share")
        if self.on_policy_share and not self.alpha:
            raise ValueError("--on_policy_share with --alpha 0: the student's own answers are learned from by the divergence, "
                             "which has no weight; give --alpha more than 0")
        if self.deepspeed and read_config(self)["zero_optimization"]["stage"] == 3:
            raise ValueError(f"--deepspeed {self.deepspeed} is ZeRO stage 3, which takes apart the head's weight, but the logits "
                             "are made with it chunk by chunk: take trainer/ds_zero2.json or trainer/ds_zero1.json")

    @property
    def beta(self):
        """The generalised Jensen-Shannon divergence's beta, of which the two KLs are the ends."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.jsd_beta}[self.divergence]


def load_teacher(args, tokenizer, device):
    """The network of --teacher, frozen. ValueError if it is not there, or if its tokenizer is not the student's."""
    own = {name: getattr(args, f"teacher_{name}") for name in SHAPE_FLAGS}
    asked = replace(args, **own)
    asked.given = {name for name in SHAPE_FLAGS if f"teacher_{name}" in args.given}
    teacher, theirs = read_weight(args.teacher, asked, device)
    if differences := tokenizer_differences(tokenizer, theirs):
        student = "MiniMind's own" if args.from_weight == "none" else f"the one of {args.from_weight}"
        raise ValueError(f"the student's tokenizer ({student}) is not that of the teacher {args.teacher}: {differences}. "
                         "Probabilities can only be compared token by token: take a student of the teacher's tokenizer, or let "
                         "the teacher write rows (scripts/make_teacher_rows.py) and train on them with train_full_sft.py")
    return teacher.to(device).eval().requires_grad_(False)


def tokenizer_differences(ours, theirs):
    """How two tokenizers differ in tokens, ids, merges or added tokens, as a few words; "" if they do not."""
    found = []
    for what, read in (("vocabulary", lambda one: one.get_vocab()), ("added tokens", lambda one: one.get_added_vocab()),
                       ("merges", lambda one: merge_ranks(one))):
        a, b = read(ours), read(theirs)
        if differing := [name for name in {**a, **b} if a.get(name) != b.get(name)]:
            example = min(differing, key=str)
            found.append(f"{len(differing)} entries of the {what} (e.g. {example!r}: {a.get(example)} and {b.get(example)})")
    return ", ".join(found)


def merge_ranks(tokenizer):
    """{pair of tokens: rank} of a byte-pair encoding."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {" ".join(pair) if isinstance(pair, list) else pair: rank for rank, pair in enumerate(model.get("merges", []))}


class StudentAnswers:
    """Puts the student's own answers into a step (Agarwal et al. 2024, algorithm 1, with a draw for each row).

    Which rows get one, and which one, depends on (seed, step, row) alone: a resumed run samples what an uninterrupted
    one samples, and so do the same rows split into other micro-batches or among other ranks, up to float ties.
    """

    def __init__(self, model, tokenizer, run, args):
        self.args, self.pad_id = args, tokenizer.pad_token_id
        self.engine = Engine(model, tokenizer, max_batch_size=64, max_len=args.max_seq_len,
                             dtype=None if run.device.type == "cpu" else run.dtype)

    def into(self, micro_batches, step):
        """The micro-batches with some answers sampled anew: "labels" has all targets, "data_labels" those of the data alone."""
        self.engine.refresh()
        batches = [documents_of(micro) for micro in micro_batches]
        draws = [(one, *self.draw(one, step)) for documents in batches for one in documents]
        chosen = [(one, seed) for one, draw, seed in draws if draw < self.args.on_policy_share]
        answers = self.engine.generate([prompt_of(one) for one, _ in chosen],
                                       [SamplingParams(max_tokens=self.args.max_new_tokens, seed=seed) for _, seed in chosen])
        for (one, _), answer in zip(chosen, answers):
            ids = torch.tensor(answer.tokens)
            one |= {"input_ids": ids, "labels": ids.masked_fill(torch.arange(len(ids)) < len(answer.prompt), IGNORE),
                    "data_labels": torch.full_like(ids, IGNORE)}
        return [self.packed(documents, step) for documents in batches]

    def draw(self, document, step):
        """(a number from 0 to 1, a seed) for a document in a step."""
        text = f"{self.args.seed}:{step}:{document['input_ids'].tolist()}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "big") / 2**32, int.from_bytes(digest[4:], "big")

    def packed(self, documents, step):
        """One micro-batch of documents, with as many rows as they need."""
        rows = pack([len(one["input_ids"]) for one in documents], self.args.max_seq_len, self.args.seed, step)
        both = []
        for labels in ("labels", "data_labels"):
            filled = [[{"input_ids": documents[i]["input_ids"].numpy(), "labels": documents[i][labels].numpy()} for i in row]
                      for row in rows]
            both.append(collate(filled, self.args.max_seq_len, max(1, len(rows)), self.pad_id))
        return both[0] | {"data_labels": both[1]["labels"]}


def documents_of(micro):
    """The documents of a packed micro-batch as {"input_ids", "labels", "data_labels"}, [n] each, without padding."""
    found = []
    for ids, labels, positions in zip(micro["input_ids"], micro["labels"], micro["position_ids"]):
        lengths = torch.diff((positions == 0).nonzero()[:, 0], append=torch.tensor([len(ids)])).tolist()
        found += [{"input_ids": a, "labels": b, "data_labels": b} for a, b in zip(ids.split(lengths), labels.split(lengths))
                  if (b != IGNORE).any()]
    return found


def prompt_of(document):
    """What precedes the last answer of a document: a list of token ids."""
    is_target = document["labels"] != IGNORE
    begins = is_target & ~F.pad(is_target[:-1], (1, 0))  # first tokens of the answers
    return document["input_ids"][: begins.nonzero()[-1, 0]].tolist()


def data_labels(micro):
    """labels [B, T] of what stands in the data; what the student has answered itself is not there."""
    return micro.get("data_labels", micro["labels"])


def next_tokens(labels):
    """labels [B, T] -> for each position the token to predict there, -100 for none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def losses(net, model, teacher, micro, num_targets, args):
    """(the micro-batch's part of the step's loss, its sum of divergences, its sum of cross entropies); scalars.

    The network runs through `net`, whose parameters' gradients the ranks average. The head runs here, on targets alone; its
    weight is the tied embedding, or has its gradient averaged like all others.
    """
    inputs = {"input_ids": micro["input_ids"], "position_ids": micro["position_ids"]}
    out = net(**inputs, labels=micro["labels"], num_items_in_batch=num_targets, skip_logits=True, skip_nll=True,
              output_hidden_states=True)
    targets = next_tokens(micro["labels"]) != IGNORE
    with torch.no_grad():
        teachers = teacher.model(**inputs).last_hidden_state[targets]
    divergence, nll = distillation_sums(
        out.hidden_states[-1][targets], teachers, next_tokens(data_labels(micro))[targets],
        model.lm_head, teacher.lm_head, args.beta, args.temperature, args.chunk_size)
    loss = (args.alpha * divergence + (1 - args.alpha) * nll) / num_targets + out.loss  # of a mixture: keep experts busy alike
    return loss, divergence.detach(), nll.detach()


def main(argv=None):
    args = parse_args(DistillationArgs, argv)
    with Run(args) as run:
        if not args.data_path:
            run.ranks.from_first(lambda: write_world("mini", TOY))
            args.data_path = [str(TOY / "sft_train.jsonl")]
        model, tokenizer = load_model(args, run.device)
        teacher = load_teacher(args, tokenizer, run.device)
        teachers_name = run.ranks.from_first(lambda: network_sha256(teacher))
        folder = run_folder(args, model.config, run.ranks)

        def build(paths):
            return SFTDataset(paths, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, cache_dir=args.cache_dir,
                              num_proc=args.num_proc, seed=args.seed)

        dataset = build(args.data_path)
        if args.inspect:
            return show_rows(dataset, tokenizer, args.inspect)
        run.say(dataset.report)
        training, held_out = validation_sets(args, dataset, build)
        data = fingerprint(data=training.fingerprint, teacher=teachers_name)
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, model, tokenizer, optimizer, data)
        batches = step_batches(PackedBatches, training, args, run, tokenizer, checkpoint)
        run.say(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters learn from {teacher.num_parameters() / 1e6:.1f}M, "
                f"{len(batches)} steps on {run}; beside the teacher's weights {run.memory_advice(model)}")
        net = run.wrap(model, optimizer)
        answers = StudentAnswers(model, tokenizer, run, args) if args.on_policy_share else None
        teachers_scores = {
            f"val_bpb/{name}_teacher": bits_per_byte(teacher, tokenizer, view, run, args.max_seq_len, args.batch_size)["bpb"]
            for name, view in held_out.items()}
        for name, bpb in teachers_scores.items():
            run.say(f"{name}: {bpb:.4f}")

        def evaluate(index):
            scores, text = validate(model, tokenizer, held_out, run, args, index)
            return scores | teachers_scores, text

        with Loop(folder, args, run, model, optimizer, checkpoint, batches, data, evaluate if held_out else None) as loop:
            for micro_batches in loop:
                if answers:
                    micro_batches = answers.into(micro_batches, loop.done)
                num_targets = run.sum(count_targets(micro_batches))  # of the whole step: all micro-batches of all ranks
                loss = divergence = nll = 0.0
                for micro in micro_batches:
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        part = losses(net, model, teacher, run.to_device(micro), num_targets, args)
                        run.backward(part[0])
                    loss, divergence, nll = loss + part[0].detach(), divergence + part[1], nll + part[2]
                num_data = run.sum(count_targets([{"labels": data_labels(micro)} for micro in micro_batches]))
                loop.update(run.sum(loss), num_targets, micro_batches, kd_loss=run.sum(divergence) / num_targets,
                            ce_loss=run.sum(nll) / max(num_data, 1))  # clip, step, log, validate, save


if __name__ == "__main__":
    command(main)
