"""The rival of the benchmark: SLED as the released code computes it, in PyTorch.

Written anew for this benchmark, keeping what costs time and memory there: batch 1, one projection per
candidate layer, the gradients of all k candidate tokens as one (L, k, V) array, their cosines with the
(L, V) differences, every layer's latent distribution spread over the vocabulary, one evolution step on
the whole vocabulary, and the clamp.
"""

import torch
import torch.nn.functional as F


def torch_sled_logits(h_CD, w_VD, rate: float = 2.0, scale: int = 10, lower_bound: float = -1000.0):
    """Evolved logits (V,) of one token's hidden states (C, D), final layer last."""
    projected = [F.linear(h_D.view(1, 1, -1), w_VD)[:, -1] for h_D in h_CD]
    early_L1V, final_1V = torch.stack(projected[:-1]), projected[-1].clone()
    probs_1V, probs_L1V = final_1V.softmax(-1), early_L1V.softmax(-1)
    top_K = probs_1V.topk(scale).indices[0]

    gradient_LKV = probs_L1V.expand(-1, scale, -1)
    one_hot_LKV = torch.zeros_like(gradient_LKV)
    one_hot_LKV.scatter_(2, top_K.view(1, -1, 1).expand(len(early_L1V), -1, -1), 1)
    gradient_LKV = gradient_LKV - one_hot_LKV
    cosine_LK = F.cosine_similarity(gradient_LKV, early_L1V - final_1V, dim=2)

    m_LK = cosine_LK.clamp(min=0) ** 2
    m_L = m_LK.sum(1)
    # Per layer a distribution over its top tokens, weighed by the layer's share of the whole.
    latent_LV = torch.zeros_like(early_L1V[:, 0])
    latent_LV.scatter_(1, top_K.expand(len(m_LK), -1), m_LK / m_L.where(m_L > 0, 1).unsqueeze(1))
    latent_V = (latent_LV * (m_L / m_L.sum().clamp(min=1e-30)).unsqueeze(1)).sum(0)

    evolved_1V = final_1V.clone()
    evolved_1V.sub_(rate * (evolved_1V.softmax(-1) - latent_V))
    clamped_V = torch.full_like(evolved_1V[0], lower_bound)
    clamped_V[top_K] = evolved_1V[0, top_K]
    return clamped_V
