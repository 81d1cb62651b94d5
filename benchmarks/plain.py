"""The loop as the released codes write it, from its specification: one class after another, everything anew.

It is what the benchmark measures against and what a test holds the package's fast paths equal to.
"""
import torch
from torch import nn
from torch.nn import functional as F

def plain_network(net):
    "The same network with torch's own pooling, and a ReLU that keeps what it read"
    for block in net.blocks:
        if hasattr(block, 'pool'): block.act, block.pool = nn.ReLU(), nn.AvgPool2d(2)
    return net

@torch.no_grad()
def embed(net, data):
    "Embeddings of each class, the whole class in one batch"
    split, out = data.train, []
    for first, n in zip(split.starts, split.counts):
        out.append(net.embed(data.normalize(split.x[first:first + n].float()/255)))
    return out

@torch.no_grad()
def kmeans(x, centres, max_iter=100, tol=1e-4):
    "One class: one-hot products until the centres rest; an empty cluster becomes the zero vector"
    for _ in range(max_iter):
        nearest = (2*x@centres.T - x.square().sum(1)[:, None] - centres.square().sum(1)).argmax(1)
        member = F.one_hot(nearest, len(centres)).to(x.dtype)
        moved = member.T@x/(member.sum(0)[:, None] + 1e-8)
        moves, centres = (moved - centres).square().sum(), moved
        if moves <= tol: break
    return centres

def select(net, data, k):
    "Positions (C,k): for each centre of each class the nearest image"
    picks = []
    for first, x in zip(data.train.starts, embed(net, data)):
        picks.append(first + torch.cdist(kmeans(x, x[torch.randperm(len(x))[:k]]), x).argmin(1))
    return torch.stack(picks)

def class_loss(net, real, syn, y, see):
    "DREAM+ for one class: squared distances of convolution gradients, and of mean embeddings"
    both = net.embed(see(torch.cat([real, syn])))
    sides = both[:len(real)], both[len(real):]
    labels = [torch.full((len(e),), y) for e in sides]
    losses = [F.cross_entropy(net.logits(e), t) for e, t in zip(sides, labels)]
    a, b = (torch.autograd.grad(l, net.parameters(), create_graph=i > 0, retain_graph=True)
            for i, l in enumerate(losses))
    weights = [i for i, p in enumerate(net.parameters()) if p.ndim > 2]
    return (sum((a[i].detach() - b[i]).square().sum() for i in weights)
            + (sides[0].mean(0).detach() - sides[1].mean(0)).square().sum())

def step(net, data, pixels, real, augment, draw, decode):
    "The loss of all classes; gradients gather in `pixels` (C*n,ch,h,w) and, as in the released codes, in the network"
    total, classes = 0., data.n_classes
    for c in range(classes):
        row = {k: v[c:c + 1] for k, v in draw.items()}
        see = lambda x, row=row: augment(data.normalize(x)[None], row)[0]
        images = data.train.x[real[c]].float()/255
        stored = pixels.view(classes, -1, *pixels.shape[1:])[c]
        loss = class_loss(net, images, decode(stored), c, see)
        loss.backward()
        total += loss.item()
    return total
