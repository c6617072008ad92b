/* C ABI of atts-engine's native kernels. No header of torch or CUDA is needed to include this one. */
#ifndef ATTS_ATTS_H_
#define ATTS_ATTS_H_

#include <stdint.h>

#define ATTS_VERSION_MAJOR 0
#define ATTS_VERSION_MINOR 1
#define ATTS_VERSION_PATCH 0
#define ATTS_VERSION (ATTS_VERSION_MAJOR * 10000 + ATTS_VERSION_MINOR * 100 + ATTS_VERSION_PATCH)

/* A level, or a uniform, of 1. */
#define ATTS_LEVEL_ONE (INT64_C(1) << 32)
/* Scores of one ring. Keeps every product of the test below 2^62. */
#define ATTS_GATE_MAX_CAPACITY (INT64_C(1) << 28)

#if defined(_WIN32)
#define ATTS_API __declspec(dllexport)
#else
#define ATTS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum atts_status {
  ATTS_OK = 0,
  ATTS_ERROR_ABI = 1,          /* params.struct_size is not this header's */
  ATTS_ERROR_NULL_POINTER = 2, /* an array is missing */
  ATTS_ERROR_SHAPE = 3,        /* a count that is negative or 0 where it must not be, or a capacity above ATTS_GATE_MAX_CAPACITY */
  ATTS_ERROR_KEY = 4,          /* a key outside 0..keys-1, a token id outside the vocabulary, a slot outside the cache */
  ATTS_ERROR_VALUE = 5,        /* a level outside 0.., or a u outside 1..ATTS_LEVEL_ONE */
  ATTS_ERROR_STORE = 6,        /* a size outside 0..capacity or a head outside 0..capacity-1 */
  ATTS_ERROR_NO_CUDA = 7,      /* the library was built without CUDA */
  ATTS_ERROR_CUDA = 8,         /* the launch failed; cudaGetLastError was consumed */
  ATTS_ERROR_BATCH = 9,        /* cu_q, kv_len and the block table do not describe one batch over the pages */
  ATTS_ERROR_ISA = 10          /* this processor, or this build, has no such instruction set */
} atts_status;

/* The conformal gate: count every row of a batch against the ring of its key as it is, decide, then insert in index
 * order. All arrays are dense; host pointers for atts_gate_cpu, device pointers for atts_gate.
 *
 *   greater = #{ring > score}, ties = #{ring == score}, n = filled part of the ring before the call
 *   takeover iff greater * 2^32 + u * (1 + ties) <= level * (n + 1)
 *   p = (greater + u / 2^32 * (1 + ties)) / (n + 1)
 *
 * A score that is NaN or infinite is not inserted: greater = -1, ties = 0, takeover = 0, p = NaN. */
typedef struct atts_gate_params {
  uint64_t struct_size;   /* sizeof(atts_gate_params) */
  const float* score;     /* [batch] */
  const int64_t* key;     /* [batch], 0..keys-1 */
  const int64_t* level;   /* [batch], 0 (never) .. 2^32 (always): ceil(alpha * 2^32) */
  const int64_t* u;       /* [batch], 1..2^32 */
  const uint8_t* insert;  /* [batch], 0 or 1 */
  float* ring;            /* [keys, capacity], changed */
  int64_t* size;          /* [keys], changed */
  int64_t* head;          /* [keys], changed: where the next score goes */
  int64_t* greater;       /* [batch], written */
  int64_t* ties;          /* [batch], written */
  int64_t* n;             /* [batch], written */
  uint8_t* takeover;      /* [batch], written */
  double* p;              /* [batch], written */
  int64_t batch;
  int64_t keys;
  int64_t capacity;
} atts_gate_params;

/* A dense layer in bfloat16: out = x weight^T + bias, summed in fp32 and rounded once. All arrays are dense, row by row,
 * on the host; a bfloat16 is its 16 bits. A row of `out` has the same bits whatever rows share the call and however many
 * threads there are. Safe to call from several threads at once. */
typedef struct atts_linear_params {
  uint64_t struct_size;    /* sizeof(atts_linear_params) */
  const uint16_t* x;       /* [rows, in_features] */
  const uint16_t* weight;  /* [out_features, in_features] */
  const uint16_t* bias;    /* [out_features], or NULL */
  uint16_t* out;           /* [rows, out_features], written; must not overlap x */
  int64_t rows;            /* 0 or more */
  int64_t in_features;     /* 1 or more */
  int64_t out_features;    /* 1 or more */
  int32_t threads;         /* 1 or more */
} atts_linear_params;

/* logprob[i] = log softmax(hidden weight^T)[i, ids[i]] in bfloat16, logits in fp32 and never rounded. Dense arrays, on the
 * host; a row has the same bits whatever rows share the call. NaN where a row is not finite. */
typedef struct atts_score_tokens_params {
  uint64_t struct_size;    /* sizeof(atts_score_tokens_params) */
  const uint16_t* hidden;  /* [rows, width] */
  const uint16_t* weight;  /* [vocab, width] */
  const int64_t* ids;      /* [rows], 0..vocab-1 */
  float* logprob;          /* [rows], written */
  int64_t rows, width, vocab;
  int32_t threads;         /* 1 or more */
} atts_score_tokens_params;

/* The same of logits[rows, vocab] in bfloat16 that exist already. */
typedef struct atts_score_logits_params {
  uint64_t struct_size;    /* sizeof(atts_score_logits_params) */
  const uint16_t* logits;  /* [rows, vocab], rows logits_stride apart */
  const int64_t* ids;      /* [rows], in 0..vocab-1 */
  float* logprob;          /* [rows], written */
  int64_t rows, vocab, logits_stride;
  int32_t threads;         /* 1 or more */
} atts_score_logits_params;

/* Causal attention over a paged cache in bfloat16, softmax in fp32. Query rows cu_q[b] .. cu_q[b+1]-1 are the last positions
 * of sequence b's kv_len[b] tokens; token t of it lies in slot t % page of page block_table[b, t / page]. */
typedef struct atts_attention_params {
  uint64_t struct_size;        /* sizeof(atts_attention_params) */
  const uint16_t* q;           /* [rows, heads, head_dim] */
  const uint16_t* kv;          /* [2, pages, page, kv_heads, head_dim], keys and then values */
  const int32_t* block_table;  /* [batch, table_width] */
  const int32_t* cu_q;         /* [batch + 1], from 0 to rows */
  const int32_t* kv_len;       /* [batch], the queries' own tokens included */
  uint16_t* out;               /* [rows, heads, head_dim], written */
  int64_t rows, batch, table_width, pages, page;
  int64_t heads, kv_heads;     /* heads is a multiple of kv_heads */
  int64_t head_dim;            /* a multiple of 16 */
  float scale;
  int32_t threads;             /* 1 or more */
} atts_attention_params;

/* out = y / sqrt(mean(y^2) + eps), rounded, times weight, rounded, where y is x, or x + delta, rounded and kept in sum. */
typedef struct atts_rms_norm_params {
  uint64_t struct_size;    /* sizeof(atts_rms_norm_params) */
  const uint16_t* x;       /* [rows, width], rows x_stride apart */
  const uint16_t* delta;   /* [rows, width], dense, or NULL */
  const uint16_t* weight;  /* [width] */
  uint16_t* sum;           /* [rows, width], dense, written; NULL where delta is */
  uint16_t* out;           /* [rows, width], dense, written */
  int64_t rows, width, x_stride;
  float eps;
  int32_t threads;         /* 1 or more */
} atts_rms_norm_params;

/* out = gate / (1 + exp(-gate)) * up, in fp32, rounded once. */
typedef struct atts_silu_mul_params {
  uint64_t struct_size;  /* sizeof(atts_silu_mul_params) */
  const uint16_t* gate;  /* [rows, width], rows gate_stride apart */
  const uint16_t* up;    /* [rows, width], rows up_stride apart */
  uint16_t* out;         /* [rows, width], dense, written */
  int64_t rows, width, gate_stride, up_stride;
  int32_t threads;       /* 1 or more */
} atts_silu_mul_params;

/* Rotary embedding: elements i and i + head_dim / 2 of a head turn together. Heads of a row lie side by side. */
typedef struct atts_rope_params {
  uint64_t struct_size;  /* sizeof(atts_rope_params) */
  const uint16_t* x;     /* [rows, heads, head_dim], rows row_stride apart */
  const float* cosine;   /* [rows, head_dim / 2], dense */
  const float* sine;     /* [rows, head_dim / 2], dense */
  uint16_t* out;         /* [rows, heads, head_dim], dense, written */
  int64_t rows, heads, head_dim, row_stride;
  int32_t threads;       /* 1 or more */
} atts_rope_params;

/* k and v of `rows` tokens to their slots of a layer's cache; width is kv_heads * head_dim. */
typedef struct atts_kv_append_params {
  uint64_t struct_size;  /* sizeof(atts_kv_append_params) */
  const uint16_t* k;     /* [rows, width], rows k_stride apart */
  const uint16_t* v;     /* [rows, width], rows v_stride apart */
  const int64_t* slots;  /* [rows], 0..slot_count-1, each named once */
  uint16_t* kv;          /* [2, slot_count, width], changed */
  int64_t rows, width, k_stride, v_stride, slot_count;
} atts_kv_append_params;

/* One token per row of logits by the Gumbel-max trick; the noise of a token is a hash of (seed, position, id). A row with
 * NaN or without a finite largest logit gives -1. */
typedef struct atts_sample_params {
  uint64_t struct_size;      /* sizeof(atts_sample_params) */
  const uint16_t* logits;    /* [rows, vocab], bfloat16, rows logits_stride apart */
  const float* temperature;  /* [rows], 0: the largest, the first of ties */
  const int64_t* top_k;      /* [rows], 0: off */
  const float* top_p;        /* [rows], 1: off */
  const float* min_p;        /* [rows], 0: off */
  const int64_t* seed;       /* [rows] */
  const int64_t* position;   /* [rows] */
  int64_t* ids;              /* [rows], written */
  int64_t rows, vocab, logits_stride;
  int32_t threads;           /* 1 or more */
} atts_sample_params;

/* ATTS_VERSION of the library that was loaded. */
ATTS_API int atts_version(void);

/* One line in English for a status; never NULL, never to be freed. */
ATTS_API const char* atts_strerror(int status);

/* 1 where the library was built with CUDA, else 0. */
ATTS_API int atts_has_cuda(void);

/* Instruction set of the CPU kernels that this processor runs: "avx512bf16", "avx2" or "plain"; never to be freed. */
ATTS_API const char* atts_cpu_isa(void);

/* Have the CPU kernels of one instruction set run from the next call on, in every thread; NULL: the best that the processor
 * has. For tests and comparisons: results of two instruction sets agree to rounding and not to the bit. */
ATTS_API int atts_use_cpu_isa(const char* isa);

/* On the host. Checks every argument before it writes anything. */
ATTS_API int atts_gate_cpu(const atts_gate_params* params);

/* On the host, at AVX2 speed where the processor has it. Each checks every argument before it writes anything. */
ATTS_API int atts_linear_cpu(const atts_linear_params* params);
ATTS_API int atts_score_tokens_cpu(const atts_score_tokens_params* params);
ATTS_API int atts_score_logits_cpu(const atts_score_logits_params* params);
ATTS_API int atts_attention_cpu(const atts_attention_params* params);
ATTS_API int atts_rms_norm_cpu(const atts_rms_norm_params* params);
ATTS_API int atts_silu_mul_cpu(const atts_silu_mul_params* params);
ATTS_API int atts_rope_cpu(const atts_rope_params* params);
ATTS_API int atts_kv_append_cpu(const atts_kv_append_params* params);
ATTS_API int atts_sample_cpu(const atts_sample_params* params);

/* On the device, in one launch on `stream` (a cudaStream_t; NULL is the default stream), without a wait. The arrays cannot
 * be read here, so keys, levels and sizes are the caller's care: a row whose key does not exist is not written. */
ATTS_API int atts_gate(const atts_gate_params* params, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* ATTS_ATTS_H_ */
