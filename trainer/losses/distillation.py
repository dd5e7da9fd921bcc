"""How far a student's next tokens are from its teacher's, in memory that does not grow with the
number of positions.

With p = softmax(teacher's logits / T) and q = softmax(student's logits / T), for each target
position:

    forward KL   KL(p || q) = sum_v p_v (log p_v - log q_v). The student must give probability to
                 all that the teacher gives some to. Hinton et al. 2015, section 2: their cross
                 entropy with soft targets is this plus the teacher's entropy, which has no
                 gradient.
    reverse KL   KL(q || p). The student may leave out what it has no room for, but must not say
                 what the teacher would not. Gu et al. 2023 (MiniLLM), eq. 1, here token by token
                 instead of over whole answers.
    JSD(b)       b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q. Agarwal et al. 2024
                 (GKD), eq. 1.

JSD(b) / b tends to the forward KL as b goes to 0, and JSD(b) / (1 - b) to the reverse KL as b goes
to 1, where JSD itself vanishes. So b = 0 names the forward and b = 1 the reverse KL, as in GKD's
experiments and in TRL. All are multiplied by T^2: gradients through soft targets shrink as 1 / T^2,
and would lose weight against the cross entropy that they are mixed with (Hinton et al. 2015,
section 2). TRL leaves this factor out.

Shape letters: n target positions   c positions of a chunk   D, D' widths of student and teacher   V
                                    vocabulary
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """labels [B, T] -> for each position the token to predict there, -100 for none."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL(a || b) of each row; both are log-probabilities [n, V], the result is [n]."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def generalised_jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """JSD(beta) of each row [n]; log_p (teacher) and log_q (student) [n, V].

    beta 0: forward KL, 1: reverse KL.
    """
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def distillation_sums(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    student_head: torch.nn.Module,
    teacher_head: torch.nn.Module,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over target positions: (T^2 times the divergence, -log q of the label); scalars.

    student [n, D], teacher [n, D']: final hidden states. labels [n]: token ids, -100 where there is
    only a teacher. The heads turn hidden states into logits. Both logits of `chunk_size` positions
    at a time are made, reduced and forgotten; backward makes them again (Chen et al. 2016). So
    memory holds [c, V] and never [n, V]. So many arguments, since each network is its hidden states
    and a head.
    """

    def sums(student, teacher, labels):
        logits = student_head(student).float()  # c V
        with torch.no_grad():
            log_p = (teacher_head(teacher).float() / temperature).log_softmax(-1)
        log_q = (logits / temperature).log_softmax(-1)
        divergence = temperature**2 * generalised_jsd(log_p, log_q, beta).sum()
        return divergence, F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    # n = 0 is one empty chunk: its zero still reaches all parameters, whose gradients the ranks
    # exchange
    chunks = zip(*(x.split(chunk_size) for x in (student, teacher, labels)), strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    divergences, nlls = zip(*(checkpoint(sums, *chunk, **options) for chunk in chunks))
    return torch.stack(divergences).sum(), torch.stack(nlls).sum()
