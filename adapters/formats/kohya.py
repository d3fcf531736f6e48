"""kohya's own files: the names of `lycoris`, with the header that sd-scripts writes and webui reads.

A word alone becomes the file of vectors that sd-scripts writes; see `embedding`.
"""

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats import embedding, lycoris
from diffgraft.adapters.formats.families import with_known_family
from diffgraft.adapters.formats.training_written import write_training


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Raises ValueError where a module holds something that has no name here."""
    if not adapter.deltas:
        return embedding.write_nameless(adapter)
    adapter = with_known_family(adapter)
    tensors, header = lycoris.write(adapter)
    return tensors, {**header, **write_training(adapter, tensors)}


DIALECT = Dialect(
    name="kohya",
    summary="the files of kohya's sd-scripts, which most programs open",
    order=110,
    write=write,
    auto=20,
)
