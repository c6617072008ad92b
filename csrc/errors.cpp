#include "atts/atts.h"

extern "C" int atts_version(void) { return ATTS_VERSION; }

extern "C" const char* atts_strerror(int status) {
  switch (status) {
    case ATTS_OK:
      return "success";
    case ATTS_ERROR_ABI:
      return "params.struct_size differs: caller and library were built from different headers";
    case ATTS_ERROR_NULL_POINTER:
      return "an array pointer is null";
    case ATTS_ERROR_SHAPE:
      return "a count or the capacity is out of range, or a product of sizes too large to address";
    case ATTS_ERROR_KEY:
      return "a key, token id, slot or page is outside the store";
    case ATTS_ERROR_VALUE:
      return "a level is outside 0..2^32 or a uniform outside 1..2^32";
    case ATTS_ERROR_STORE:
      return "a ring's size or head is outside its capacity";
    case ATTS_ERROR_NO_CUDA:
      return "this library was built without CUDA";
    case ATTS_ERROR_CUDA:
      return "the CUDA launch failed";
    case ATTS_ERROR_BATCH:
      return "cu_seqlens, or cu_q, kv_len and the block table, do not describe one batch over the pages";
    case ATTS_ERROR_ISA:
      return "this processor or this build does not have that instruction set";
    case ATTS_ERROR_DTYPE:
      return "dtype is not one of atts_dtype";
    case ATTS_ERROR_STRIDE:
      return "a stride is so small that rows or heads overlap";
    case ATTS_ERROR_ALIGNMENT:
      return "an array is not aligned to its element, a workspace not to 16 bytes, or packed weights not to 64";
    case ATTS_ERROR_DEVICE:
      return "an array is not memory of the current device, or host memory is not pinned";
    case ATTS_ERROR_WORKSPACE:
      return "the workspace, or the room for packed weights, is smaller than what is asked for";
    case ATTS_ERROR_OVERLAP:
      return "a page or slot is written twice, or both read and written";
    case ATTS_ERROR_PACKED:
      return "packed weights are none, or of other sizes";
    default:
      return "unknown status";
  }
}
