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
      return "a count or the capacity is out of range";
    case ATTS_ERROR_KEY:
      return "a key, token id or slot is outside the store";
    case ATTS_ERROR_VALUE:
      return "a level or a uniform is outside 1..2^32";
    case ATTS_ERROR_STORE:
      return "a ring's size or head is outside its capacity";
    case ATTS_ERROR_NO_CUDA:
      return "this library was built without CUDA";
    case ATTS_ERROR_CUDA:
      return "the CUDA launch failed";
    case ATTS_ERROR_BATCH:
      return "cu_q, kv_len and the block table do not describe one batch over the pages";
    case ATTS_ERROR_ISA:
      return "this processor or this build does not have that instruction set";
    default:
      return "unknown status";
  }
}
