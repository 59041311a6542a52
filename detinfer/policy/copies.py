"""Operations that move bytes and compute nothing, so that no order can hide in them.

Spelled as torch's dispatcher names them, the overload called ``default`` left out: ``aten::view``,
``aten::slice.Tensor``. In-place and ``out`` forms are listed by name, since not every one of them exists.

Where an operation of this list changes the dtype on the way (``_to_copy``, ``copy_``, ``cat`` of mixed dtypes), it is
a cast: one IEEE rounding per element, and decided as such.
"""

from __future__ import annotations

import torch

_VIEWS = """
    alias as_strided as_strided_ detach detach_ diagonal expand imag real permute select.int slice.Tensor split.Tensor
    split_with_sizes squeeze squeeze.dim squeeze.dims squeeze_ squeeze_.dim squeeze_.dims t t_ transpose.int transpose_
    swapdims_ swapaxes_ unbind.int unfold unsqueeze unsqueeze_ view view_as_complex view_as_real
    _reshape_alias _unsafe_view lift lift_fresh slice_inverse unsafe_split.Tensor unsafe_split_with_sizes
    set_.source_Tensor set_.source_Storage set_.source_Storage_storage_offset set_
"""

# A view of another dtype (view.dtype) reads the same bytes; its result is another number, but no arithmetic is done.
_REINTERPRETED = "view.dtype"

_COPIES = """
    alias_copy as_strided_copy as_strided_scatter block_diag cat cat.out channel_shuffle clone complex constant_pad_nd
    constant_pad_nd.out copy copy_ detach_copy diag_embed diagonal_copy diagonal_scatter embedding embedding.out
    expand_copy flip flip.out gather gather.out index.Tensor index.Tensor_out _unsafe_index.Tensor index_copy
    index_copy_ index_select index_select.out lift_fresh_copy masked_scatter masked_scatter_ masked_select
    masked_select.out narrow_copy native_channel_shuffle permute_copy pixel_shuffle pixel_unshuffle put put_
    reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat.out repeat_interleave.self_int
    repeat_interleave.self_Tensor replication_pad1d replication_pad2d replication_pad3d _reshape_copy roll roll.out
    rot90 scatter.src scatter_.src scatter.src_out select_copy.int select_scatter slice_copy.Tensor slice_scatter
    split_copy.Tensor split_with_sizes_copy squeeze_copy squeeze_copy.dim squeeze_copy.dims stack stack.out _stack
    t_copy take take.out transpose_copy.int tril tril.out tril_ triu triu.out triu_ unbind_copy.int unfold_copy
    unsqueeze_copy view_copy where.self where.self_out _to_copy _to_copy.out
    index_put index_put_ _index_put_impl_ _unsafe_index_put index_put.out
"""

# They write a constant (rounded once to the dtype, the same for every element) or leave memory as it is.
_CONSTANTS = """
    empty.memory_format empty_like empty_strided empty_permuted new_empty new_empty_strided resize_ resize_as_
    eye eye.m fill.Scalar fill.Tensor fill_.Scalar fill_.Tensor fill_diagonal_ full full.out full_like
    index_fill.int_Scalar index_fill.int_Tensor index_fill_.int_Scalar index_fill_.int_Tensor
    masked_fill.Scalar masked_fill.Tensor masked_fill_.Scalar masked_fill_.Tensor
    new_full new_ones new_zeros ones ones.out ones_like scalar_tensor scatter.value scatter_.value scatter.value_out
    zero zero_ zeros zeros.out zeros_like
"""

# They read a value or a shape and return no floating-point tensor.
_READS = """
    _local_scalar_dense item equal is_nonzero is_same_size _has_same_storage_numel nonzero nonzero_static argwhere
    count_nonzero count_nonzero.dim_IntList result_type.Tensor result_type.Scalar is_pinned
    _assert_async _assert_async.msg _assert_tensor_metadata _is_all_true _is_any_true
    sym_size.int sym_stride.int sym_numel sym_storage_offset sym_is_contiguous
    any any.dim any.dims any.all_out all all.dim all.dims all.all_out
"""


def named(*tables: str) -> frozenset[str]:
    """The operations whose names stand in ``tables``, without their namespace and separated by blanks."""
    return frozenset("aten::" + word for table in tables for word in table.split())


COPIES = named(_VIEWS, _REINTERPRETED, _COPIES, _CONSTANTS, _READS)
"""The operations of this module: accepted in every dtype as long as the dtype does not change on the way."""

CAST = "aten::_to_copy"
"""The operation whose proof stands for every cast."""

_ANY_DTYPES = named(_READS, _REINTERPRETED)
_CONVERTING = named(
    "_to_copy _to_copy.out copy_ copy fill.Tensor fill_.Tensor cat cat.out stack stack.out _stack where.self "
    "where.self_out"
)


def casts(op: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether ``op`` of COPIES changes a dtype on the way, for arguments (or a wanted result) of these dtypes.

    An index or a mask beside floating-point data is not data: it never makes a gather a cast. Operations that convert
    (``copy_``, ``cat`` and the like) cast integers too.
    """
    if op in _ANY_DTYPES:
        return False
    if op in _CONVERTING:
        data = {d for d in dtypes if not (op.startswith("aten::where") and d is torch.bool)}
        return len(data) > 1
    return len({d for d in dtypes if d.is_floating_point or d.is_complex}) > 1
