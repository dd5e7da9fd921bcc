"""Episodes with tools: the policy calls them, sees their results, calls again, and answers."""

from transformers import PreTrainedTokenizerBase

from dataset.chat.format import encode_conversation, encode_prompt
from dataset.chat.tools import ToolBox
from dataset.prompt_dataset import PromptDataset
from trainer.rl.rewards import tools_of, written_messages
from trainer.rl.rollout import Completion, Rollout, Sample, begin_samples, draw_seed
from trainer.runtime.run import Run


class Episodes:
    """A sampler of batched conversations with tools: `episodes(dataset, items, seeds)` -> [Sample].

    The next turn is sampled after the very tokens of the earlier ones, not after their text
    tokenized again: so the log-probabilities are those of the sequence that is trained on. tools:
    all that there are; an episode has those that its row offers.
    """

    def __init__(
        self, run: Run, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, tools: ToolBox
    ):
        self.args, self.rollout, self.tokenizer = run.args, rollout, tokenizer
        self.tools = tools.tools
        # the tokens of tool results are those of a conversation after the end of its last turn
        self.stub = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ids = encode_conversation(tokenizer, self.stub)[0]
        self.stub_end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)

    def __call__(
        self,
        dataset: PromptDataset,
        items: list[int],
        seeds: list[int],
        temperature: float | None = None,
    ) -> list[Sample]:
        samples = begin_samples(dataset, items)
        alive = list(range(len(samples)))
        for turn in range(self.args.max_turns):
            completions = self.rollout(
                [samples[i].prompt + samples[i].tokens for i in alive],
                [draw_seed(seeds[i], turn) for i in alive],
                self.args.max_completion_length,
                temperature,
            )
            pairs = list(zip(alive, completions))
            alive = [i for i, completion in pairs if self.take_turn(samples[i], completion)]
            is_last = turn == self.args.max_turns - 1
            alive = [i for i in alive if not is_last and self.run_calls(samples[i])]
        return samples

    def take_turn(self, sample: Sample, completion: Completion) -> bool:
        """Add a completion to an episode; True if it holds calls, whose results must come next."""
        sample.add(completion, self.args.thinking, has_tools=bool(tools_of(sample.row)))
        has_calls = "tool_calls" in sample.messages[-1]
        sample.is_complete = completion.is_complete and not has_calls
        return completion.is_complete and has_calls

    def run_calls(self, sample: Sample) -> bool:
        """Run the last turn's calls of tools that the row offers; True if another turn fits then.

        The results become tokens that nobody sampled; if no turn can follow, they are in the
        messages alone.
        """
        box = ToolBox([self.tools[name] for name in tools_of(sample.row)], self.args.tool_timeout)
        results = [
            {"role": "tool", "content": box.run(call["name"], call["arguments"])}
            for call in sample.messages[-1]["tool_calls"]
        ]
        sample.messages += results
        messages = [*self.stub, *results]
        ids = encode_prompt(self.tokenizer, messages, enable_thinking=self.args.thinking)
        ids = ids[self.stub_end :]
        length = len(sample.prompt) + len(sample.tokens) + len(ids)
        if length + self.args.max_completion_length > self.args.max_seq_len:
            return False
        sample.tokens += ids
        sample.is_sampled += [False] * len(ids)
        sample.log_probs += [0.0] * len(ids)
        return True


def episode_metrics(samples: list[Sample]) -> dict[str, float]:
    """The mean numbers of turns and of well-formed calls of an episode."""
    written = [written_messages(sample) for sample in samples]
    turns = sum(len(messages) for messages in written)
    calls = sum(len(x.get("tool_calls", ())) for messages in written for x in messages)
    return {"turns/mean": turns / len(samples), "calls/mean": calls / len(samples)}
