"""What the TurboQuant packages in torch share: a search that takes much memory."""

from .contract import NotAvailableError, Workload
from .torch_base import TorchContender

MOST_DISTANCES_BYTES = 2 << 30  # of one layer's keys to all centroids, which these packages form


class NearestCentroid(TorchContender):
    """Packages that rotate, and form all distances to the 2**bits centroids to find the nearest."""

    def load(self, work: Workload) -> None:
        distances = work.keys[0].size * 2**self.bits * 4
        if distances > MOST_DISTANCES_BYTES:
            raise NotAvailableError(
                f"forms the distances to all {2**self.bits} centroids:"
                f" {distances / 2**30:.0f} GiB for the keys of one layer"
            )
        super().load(work)
