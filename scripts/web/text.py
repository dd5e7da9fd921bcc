"""Every text of the web page, in English and in Chinese, and the visitor's language."""

import streamlit as st

LANGUAGES = {"en": "English", "zh": "中文"}

TEXT = {
    # pages
    "chat": ("Chat", "对话"),
    "compare": ("Compare", "模型对比"),
    "curves": ("Curves", "训练曲线"),
    "language": ("Language", "语言"),
    # choosing a checkpoint
    "checkpoint": ("Checkpoint", "模型"),
    "left": ("Left", "左侧"),
    "right": ("Right", "右侧"),
    "base": ("Base of the adapter", "适配器的基础模型"),
    "checkpoint_help": (
        "Checkpoints and adapters in {save_dir}, with those that chat first.",
        "{save_dir} 中的模型和适配器，能对话的排在前面。",
    ),
    "is_adapter": ("{name} · adapter", "{name} · 适配器"),
    "is_completion": ("{name} · continues text", "{name} · 续写"),
    "loading": ("Loading the checkpoint …", "正在加载模型……"),
    "no_checkpoints": (
        "There is no checkpoint in {save_dir} yet. This trains a small one in a few minutes:",
        "{save_dir} 中还没有模型。下面的命令几分钟就能训练一个小模型：",
    ),
    "no_base": ("choose the checkpoint that this adapter is for", "请选择这个适配器的基础模型"),
    "cannot_load": ("{name} cannot be loaded: {error}", "{name} 无法加载：{error}"),
    # settings
    "sampling": ("Sampling", "采样"),
    "temperature": ("Temperature", "温度"),
    "temperature_help": ("0 is greedy decoding.", "0 表示贪心解码，总是取概率最大的词元。"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_help": (
        "Samples from the most probable tokens that together reach this probability.",
        "只在累计概率达到该值的词元中采样。",
    ),
    "top_k": ("Top-k", "Top-k"),
    "top_k_help": (
        "Samples from so many most probable tokens; 0 from all.",
        "只在概率最大的若干词元中采样，0 表示不限。",
    ),
    "max_tokens": ("Longest completion (tokens)", "最大生成长度（词元）"),
    "seed": ("Seed", "随机种子"),
    "seed_help": (
        "The same seed gives the same completion; Regenerate takes the next seed. Empty: a new "
        "seed each time.",
        "相同的种子得到相同的结果；“重新生成”使用下一个种子。留空则每次随机。",
    ),
    "random": ("random", "随机"),
    "thinking": ("Thinking", "思考"),
    "auto": ("auto", "自动"),
    "on": ("on", "开"),
    "off": ("off", "关"),
    "tools": ("Tools", "工具"),
    "tools_help": (
        "The model sees these tools, and its calls are really run. Models of the small toy world "
        "know one tool at a time.",
        "模型会看到这些工具，并真正执行它的调用。小型玩具世界训练的模型一次只认识一个工具。",
    ),
    "tools_none": ("none", "无"),
    "system": ("System prompt", "系统提示词"),
    # conversation
    "tagline": (
        "A language model of your own, trained from nothing.",
        "从零训练的、属于你自己的语言模型。",
    ),
    "try": ("Try one of these", "试试这些问题"),
    "completes": (
        "This checkpoint was only pretrained: it continues your text instead of answering.",
        "这个模型只做过预训练：它会续写你的文字，而不是回答问题。",
    ),
    "message": ("Ask anything", "随便问点什么"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重新生成"),
    "new_chat": ("New conversation", "新对话"),
    "writing": ("Thinking …", "思考中……"),
    "reasoning": ("Reasoning", "思考过程"),
    "called": ("Called {name}", "已调用 {name}"),
    "call_failed": ("{name} failed", "{name} 调用失败"),
    "arguments": ("Arguments", "参数"),
    "result": ("Result", "结果"),
    "was_stopped": ("stopped", "已停止"),
    "was_cut": ("length limit reached", "已达长度上限"),
    "many_tools": ("too many rounds of tools", "工具轮数过多"),
    "left_out": (
        "{count} earlier rounds left out: the conversation no longer fits",
        "对话过长，略去了前面 {count} 轮",
    ),
    "stats": (
        "{tokens} tokens · {speed} tokens/s · prompt {prompt} tokens ({reused} reused) · first "
        "token after {first} s",
        "{tokens} 个词元 · {speed} 词元/秒 · 提示 {prompt} 个词元（复用 {reused} 个）· "
        "{first} 秒后出首个词元",
    ),
    "stats_short": ("{tokens} tokens · {speed} tokens/s", "{tokens} 个词元 · {speed} 词元/秒"),
    "waiting": ("reading the prompt …", "正在读取提示……"),
    "engine_error": ("Generation failed: {error}", "生成失败：{error}"),
    "compare_hint": (
        "One prompt, two checkpoints, the same settings: before and after fine-tuning, with and "
        "without an adapter.",
        "同一个提示、两个模型、相同的设置：比较微调前后，或有无适配器。",
    ),
    # curves
    "no_runs": (
        "There is no run in {save_dir} yet. Curves appear as soon as one writes its metrics.jsonl.",
        "{save_dir} 中还没有训练记录。训练开始写入 metrics.jsonl 后，曲线就会出现。",
    ),
    "runs": ("Runs", "训练"),
    "against": ("Horizontal axis", "横轴"),
    "tokens": ("tokens", "词元"),
    "time": ("time", "时间"),
    "steps": ("steps", "步数"),
    "axis_tokens": ("target tokens (millions)", "目标词元（百万）"),
    "axis_time": ("training time (minutes)", "训练时间（分钟）"),
    "axis_steps": ("optimizer steps", "优化步数"),
    "metrics": ("Curves", "曲线"),
    "smoothing": ("Smoothing", "平滑"),
    "smoothing_help": (
        "Exponential average of the training curves: 0.9 over about ten points.",
        "对训练曲线取指数平均：0.9 约为十个点的平均。",
    ),
    "log_scale": ("Logarithmic", "对数坐标"),
    "choose_runs": ("Choose at least one run at the left.", "请在左侧至少选择一次训练。"),
    "loss": ("Training loss (nats per token)", "训练损失（奈特/词元）"),
    "val_bpb": ("Validation (bits per byte)", "验证集（比特/字节）"),
    "val_loss": ("Validation loss (nats per token)", "验证损失（奈特/词元）"),
    "tokens_per_second": ("Target tokens per second", "每秒目标词元"),
    "learning_rate": ("Learning rate", "学习率"),
    "run": ("Run", "训练"),
    "going": ("running", "进行中"),
    "step_of": ("step {step} of {steps}", "第 {step} / {steps} 步"),
    "step": ("step {step}", "第 {step} 步"),
    "refreshed": ("{time} · refreshed every {seconds} s", "{time} · 每 {seconds} 秒刷新"),
}

# first questions, each with the tool that it needs
EXAMPLES = {
    "en": (
        ("Who are you?", None),
        ("What is 12 plus 7?", None),
        ("Which is larger, 8 or 13?", None),
        ("Use the calculator: what is 27 * 34?", "calculator"),
        ("How warm is it in Romaport?", "get_weather"),
    ),
    "zh": (
        ("你是谁？", None),
        ("12 加 7 等于多少？", None),
        ("8 和 13，哪个更大？", None),
        ("用计算器算一下 27 * 34 等于多少。", "calculator"),
        ("罗特港现在多少度？", "get_weather"),
    ),
}


def translate(language: str, key: str, **fields: object) -> str:
    """The text `key` in a language ("en" or "zh"), its fields filled in."""
    return TEXT[key][list(LANGUAGES).index(language)].format(**fields)


def visitor_language() -> str:
    """The visitor's language: chosen, or else named in the address, or else the browser's."""
    if st.session_state.get("language") not in LANGUAGES:
        wanted = st.query_params.get("lang") or (st.context.locale or "en")[:2]
        st.session_state.language = wanted if wanted in LANGUAGES else "en"
    return st.session_state.language


def t(key: str, **fields: object) -> str:
    """The text `key` in the visitor's language."""
    return translate(visitor_language(), key, **fields)
