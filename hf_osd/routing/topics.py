"""Routes by topic: clusters of the prompts' embeddings, looked for again and again among the latest ones."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from ..errors import ConfigError
from .prompt import Prompt
from .router import Router

_WINDOW = 256  # latest prompts, among which topics are looked for
_EVERY = 64  # prompts from one time to the next, and before the first
_APART = 0.45  # least silhouette of topics; with less, prompts of one kind are cut in pieces
_NEARLY = 0.9  # share of the best silhouette that has to be reached with more topics
_LEAST = 1 / 16  # share of these prompts that a topic has at least
_SAME = 0.5  # least cosine between the centroids of one topic, found at two times
_RESTARTS, _ROUNDS = 4, 20  # of k-means


class ByTopic(Router):
    """
    Routes a prompt to the topic whose centroid is nearest to its embedding.

    Topics are clusters of the latest 256 prompts, by spherical k-means: as many, up to `topics`, as lie apart by their
    mean silhouette (Rousseeuw 1987). They are looked for after every 64 prompts. Before that, and where nothing lies
    apart, every prompt goes to the first route. A topic that is found again keeps its route; one that is not found any
    more is remembered.

    Args:
        topics (`int`, defaults to 4): Most topics. Each has a draft of its own that learns.

    Raises:
        ConfigError: `topics` is no integer above 0.

    Example:

    ```python
    >>> assistant = OnlineAssistant(draft, target, router=ByTopic(4))
    ```
    """

    def __init__(self, topics: int = 4) -> None:
        if not isinstance(topics, int) or topics < 1:
            raise ConfigError(f"topics must be an integer of at least 1, got {topics!r}")
        self._topics = topics
        self._latest: deque[torch.Tensor] = deque(maxlen=_WINDOW)
        self._seen = 0
        self._mean = torch.empty(0)
        self._centroids: dict[str, torch.Tensor] = {}

    def choose(self, prompt: Prompt, routes: Sequence[str]) -> str:
        """Return the nearest topic; look for topics first, where that is due."""
        self._latest.append(prompt.embedding)
        self._seen += 1
        if self._seen % _EVERY == 0:
            self._look(routes)
        return self._nearest(prompt.embedding, self._centroids) or routes[0]

    def nearest(self, prompt: Prompt, routes: Sequence[str]) -> str:
        """Return the nearest of the topics that are routes already."""
        known = {name: centroid for name, centroid in self._centroids.items() if name in routes}
        return self._nearest(prompt.embedding, known) or routes[0]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the topics, without the prompts that they were found among; see [`Router.state`]."""
        if not self._centroids:
            return {}, {"topics": []}
        centroids = torch.stack([*self._centroids.values()])
        return {"mean": self._mean, "centroids": centroids}, {"topics": [*self._centroids]}

    def load_state(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on with saved topics; see [`Router.load_state`]."""
        if numbers["topics"]:
            self._mean = tensors["mean"]
            found = zip(numbers["topics"], tensors["centroids"].unbind(), strict=True)
            self._centroids = dict([*found][: self._topics])

    def _nearest(self, embedding: torch.Tensor, centroids: Mapping[str, torch.Tensor]) -> str | None:
        if not centroids:
            return None
        directions = self._directions([*centroids.values()])
        return list(centroids)[int((directions @ (embedding - self._mean)).argmax())]

    def _directions(self, centroids: Sequence[torch.Tensor]) -> torch.Tensor:
        """Where centroids lie as seen from the mean of all prompts: unit vectors, `(topics, hidden)`."""
        return normalize(torch.stack([*centroids]) - self._mean, dim=-1)

    def _look(self, routes: Sequence[str]) -> None:
        """Look for topics among the latest prompts: those that are known keep their names, new ones get one."""
        latest = torch.stack([*self._latest])
        labels = clusters(normalize(latest - latest.mean(0), dim=-1), self._topics)
        if not bool(labels.any()):
            return
        self._mean = latest.mean(0)
        found = [latest[labels == label].mean(0) for label in range(int(labels.max()) + 1)]
        fresh = self._new_names(routes)
        known = self._known_among(found)
        for place, centroid in enumerate(found):
            name = known.get(place) or next(fresh, None)
            if name is not None:
                self._centroids[name] = centroid

    def _new_names(self, routes: Sequence[str]) -> Iterator[str]:
        """Yield names for further topics, as many as there may be; that of the first is the first route's."""
        while len(self._centroids) < self._topics:
            yield f"topic-{len(self._centroids) + 1}" if self._centroids else routes[0]

    def _known_among(self, found: Sequence[torch.Tensor]) -> dict[int, str]:
        """Return, by its place, the name of each centroid that belongs to a known topic: the nearest pairs first."""
        names: dict[int, str] = {}
        if not self._centroids:
            return names
        known = list(self._centroids)
        cosines = self._directions([*self._centroids.values()]) @ self._directions(found).T
        for pair in cosines.flatten().argsort(descending=True).tolist():
            old, new = divmod(pair, len(found))
            if cosines[old, new] >= _SAME and new not in names and known[old] not in names.values():
                names[new] = known[old]
        return names


def clusters(points: torch.Tensor, most: int) -> torch.Tensor:
    """
    Cut points into as many clusters as lie apart.

    Args:
        points (`torch.FloatTensor` of shape `(points, dimensions)`): Unit vectors around the mean of all.
        most (`int`): Clusters at most.

    Returns:
        `torch.LongTensor` of shape `(points,)`: The cluster of each, the largest being 0; all 0 where none lie apart.
    """
    labels, best = torch.zeros(len(points), dtype=torch.long), 0.0
    for number in range(2, most + 1):
        tried = _k_means(points, number)
        apart = _silhouette(points, tried)
        if apart >= max(_APART, _NEARLY * best) and int(tried.bincount().min()) >= _LEAST * len(points):
            labels, best = tried, max(best, apart)
    return labels.bincount().argsort(descending=True).argsort()[labels]


def _k_means(points: torch.Tensor, number: int) -> torch.Tensor:
    """Return the labels of the best of some runs of spherical k-means."""
    random = torch.Generator().manual_seed(number)
    runs = (_run(points, number, random) for _ in range(_RESTARTS))
    return max(runs, key=lambda labels: float((points * _centres(points, labels)[labels]).sum()))


def _run(points: torch.Tensor, number: int, random: torch.Generator) -> torch.Tensor:
    labels = (points @ _start(points, number, random).T).argmax(1)
    for _ in range(_ROUNDS):
        moved = (points @ _centres(points, labels).T).argmax(1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def _start(points: torch.Tensor, number: int, random: torch.Generator) -> torch.Tensor:
    """Draw points to begin with, each the likelier the further it lies from those before it (k-means++)."""
    chosen = torch.randint(len(points), (1,), generator=random)
    while len(chosen) < number:
        far = (1.0 - points @ points[chosen].T).amin(1).clamp(min=1e-6)
        chosen = torch.cat([chosen, far.multinomial(1, generator=random)])
    return points[chosen]


def _centres(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    sums = points.new_zeros(int(labels.max()) + 1, points.shape[1]).index_add_(0, labels, points)
    return normalize(sums, dim=-1)


def _silhouette(points: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of (b - a) / max(a, b) over points: a is the cosine distance to the own centre, b to the nearest other."""
    distances = 1.0 - points @ _centres(points, labels).T
    if distances.shape[1] < 2:
        return 0.0
    own = distances.gather(1, labels[:, None])[:, 0]
    other = distances.scatter(1, labels[:, None], torch.inf).amin(1)
    return float(((other - own) / torch.maximum(own, other).clamp(min=1e-6)).mean())
