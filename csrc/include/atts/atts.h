/* C ABI of atts-engine's native kernels. It needs no header of torch, CUDA or C++, and compiles as C11 and as C++17.
 *
 * Entry points. `atts_X_cpu(params)` runs on the host and returns when it is done. `atts_X(params, stream)` launches on
 * the current CUDA device, on `stream` (a cudaStream_t; NULL is the default stream), and returns at once. It allocates
 * nothing, waits for nothing and may be captured in a CUDA graph, unless its struct says otherwise. Both take the same
 * struct, the first with pointers that the host can read, the second with pointers of the current device. CUDA loads a
 * kernel's code at its first call: make one before a capture.
 *
 * Struct and lifetime. Set `struct_size` to sizeof the struct and every field that is not called optional; zero the
 * rest. The struct itself is read before the call returns and may then go. Arrays belong to the caller; on a device
 * they must stay as they are until the stream has passed the launch.
 *
 * Units. Counts, sizes and strides are elements unless a name ends in `_bytes`; a stride of a dimension of size 1 is
 * not looked at. [a, b] means a rows of b elements, dense and row by row where no stride is named. Addresses are
 * computed in 64 bits; a product that 64 bits do not hold is refused with ATTS_ERROR_SHAPE, and so is a launch of more
 * than 2^31 - 1 blocks (kv_append: warps).
 *
 * Alignment. An array is aligned to its element, else ATTS_ERROR_ALIGNMENT. Rows that are also aligned to 16 bytes are
 * read and written 16 bytes at a time, others element by element, with the same result to the bit.
 *
 * What is checked. Both forms check the struct: sizes, strides, dtype, alignment, pointers that are missing. The host
 * form also checks every value that an array holds (ids, slots, keys, bounds) before it writes anything. The device
 * form cannot read arrays: there a row with a bad value is left out, as each struct says, and `error`, where it is not
 * NULL, is set to the status that the host form would have returned. Nothing ever resets `error`; set it to ATTS_OK and
 * read it at leisure. The device form returns ATTS_ERROR_DEVICE where its largest array is not memory of the current
 * device. A launch that fails gives ATTS_ERROR_CUDA, and cudaGetLastError was consumed; what the kernel does later is
 * reported by CUDA as usual.
 *
 * Threads. Every function may be called from several threads at once, as long as no two calls write the same array. A
 * workspace and a store count as written.
 *
 * Results. A row's bits depend on that row alone: not on the batch, its place in it, its alignment or the number of
 * threads. Host and device agree to rounding; where a struct says "exact", to the bit. NaN is never turned into a
 * number. */
#ifndef ATTS_ATTS_H_
#define ATTS_ATTS_H_

#include <stdint.h>

#define ATTS_VERSION_MAJOR 0
#define ATTS_VERSION_MINOR 5
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
  ATTS_ERROR_NULL_POINTER = 2, /* an array is missing, or given without the one that it belongs to */
  ATTS_ERROR_SHAPE = 3,        /* a count that is negative, or 0 where it must not be, or too large to address */
  ATTS_ERROR_KEY = 4,          /* a key, a token id, a slot or a page outside its store */
  ATTS_ERROR_VALUE = 5,        /* a level outside 0..ATTS_LEVEL_ONE, or a u outside 1..ATTS_LEVEL_ONE */
  ATTS_ERROR_STORE = 6,        /* a size outside 0..capacity or a head outside 0..capacity-1 */
  ATTS_ERROR_NO_CUDA = 7,      /* the library was built without CUDA */
  ATTS_ERROR_CUDA = 8,         /* the launch failed; cudaGetLastError was consumed */
  ATTS_ERROR_BATCH = 9,        /* cu_seqlens, or cu_q, kv_len and the block table, do not describe one batch */
  ATTS_ERROR_ISA = 10,         /* this processor, or this build, has no such instruction set */
  ATTS_ERROR_DTYPE = 11,       /* dtype is not one of atts_dtype */
  ATTS_ERROR_STRIDE = 12,      /* a stride so small that rows or heads overlap */
  ATTS_ERROR_ALIGNMENT = 13,   /* an array is not aligned to its element, a workspace not to 16 bytes, packed
                                * weights not to 64 */
  ATTS_ERROR_DEVICE = 14,      /* an array is not memory of the current device, or host memory is not pinned */
  ATTS_ERROR_WORKSPACE = 15,   /* workspace_bytes is less than the op asks for */
  ATTS_ERROR_OVERLAP = 16,     /* a page or slot is written twice, or both read and written */
  ATTS_ERROR_PACKED = 17       /* packed weights that are none, or of other sizes */
} atts_status;

/* Element types. 0 is none of them, so that a field that was never set is found. */
typedef enum atts_dtype {
  ATTS_FLOAT32 = 1,
  ATTS_FLOAT16 = 2,
  ATTS_BFLOAT16 = 3
} atts_dtype;

/* The conformal gate: count every row of a batch against the ring of its key as it is, decide, then insert in index
 * order. A store holds the rings of many keys; a batch may name any of them, and bring a ring more scores than it
 * holds.
 *
 *   greater = #{ring > score}, ties = #{ring == score}, n = filled part of the ring before the call
 *   takeover iff greater * 2^32 + u * (1 + ties) <= level * (n + 1)          in 64-bit integers
 *   p = (greater + u / 2^32 * (1 + ties)) / (n + 1)                          in fp64, each operation rounded
 *
 * A score that is NaN or infinite is not inserted: greater = -1, ties = 0, takeover = 0, p = NaN. Exact.
 *
 * On a device one launch does it all. With a workspace the count of a ring is spread over many blocks, the last of
 * which decides and inserts; without one a block counts a whole ring, which takes longer the more it holds. The results
 * are the same. A row with a bad key, level, u or store is not inserted and gets what a NaN gets, with n = 0. */
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
  void* workspace;        /* optional, device: see atts_gate_workspace */
  int32_t* error;         /* optional, device: [1], see the top */
  uint64_t workspace_bytes;
  int64_t batch;          /* 0 or more */
  int64_t keys;           /* 1 or more */
  int64_t capacity;       /* 1 .. ATTS_GATE_MAX_CAPACITY */
} atts_gate_params;

/* Score of each span: score[b] = -mean and sum[b] of logprob[cu_seqlens[b] .. cu_seqlens[b+1]-1], summed in fp64 from
 * the first token to the last, so that a caller that adds a span's chunks one after the other arrives at the same bits.
 * Exact. On a device a span that is empty or outside 0..tokens gets NaN; that spans cover all tokens is not looked at
 * there. */
typedef struct atts_span_mean_params {
  uint64_t struct_size;       /* sizeof(atts_span_mean_params) */
  const float* logprob;       /* [tokens], natural logarithms */
  const int64_t* cu_seqlens;  /* [batch + 1], ascending from 0 to tokens; no span is empty */
  float* score;               /* [batch], written: nats per token, higher is worse */
  double* sum;                /* [batch], written: nats */
  int32_t* error;             /* optional, device: [1], see the top */
  int64_t tokens, batch;      /* 0 or more */
} atts_span_mean_params;

/* logprob[i] = log softmax(logits[i])[ids[i]] in one read of the logits, in fp32. NaN where a row holds NaN, +inf or
 * nothing but -inf. With cu_seqlens the spans' scores follow as in atts_span_mean_params, on a device in a second,
 * small launch.
 *
 * The sum of a row runs over fixed parts in a fixed order. With a workspace and few rows the parts of a row are spread
 * over blocks; the bits are the same. On a device an id outside the vocabulary gives NaN. */
typedef struct atts_score_logits_params {
  uint64_t struct_size;       /* sizeof(atts_score_logits_params) */
  const void* logits;         /* [rows, vocab] of dtype, rows logits_stride apart */
  const int64_t* ids;         /* [rows], 0..vocab-1 */
  float* logprob;             /* [rows], written */
  const int64_t* cu_seqlens;  /* optional: [batch + 1], ascending from 0 to rows; no span is empty */
  float* score;               /* [batch], written; NULL where cu_seqlens is */
  double* sum;                /* [batch], written; NULL where cu_seqlens is */
  void* workspace;            /* optional, device: see atts_score_logits_workspace */
  int32_t* error;             /* optional, device: [1], see the top */
  uint64_t workspace_bytes;
  int64_t rows;               /* 0 or more */
  int64_t vocab;              /* 1 or more */
  int64_t logits_stride;      /* vocab or more */
  int64_t batch;              /* 0 or more; 0 where cu_seqlens is NULL */
  int32_t dtype;              /* atts_dtype of logits */
  int32_t threads;            /* 1 or more, host; not looked at on a device */
} atts_score_logits_params;

/* A matrix of bfloat16 weights in about three quarters of its bytes, without the loss of a bit: exponents of neighbours
 * take few values, so a weight keeps its sign and mantissa, a byte, and a nibble that names its exponent in a table. For
 * products of few rows, which take the time that reading the weights takes. out_features is a multiple of 32 and
 * in_features of 64, else ATTS_ERROR_SHAPE: such a matrix stays as it is.
 *
 *   64 bytes         the header: uint64_t magic 0x3132314650535441, int64_t out_features, in_features, zeros
 *   32 bytes each    an entry for each block of 32 rows x 64 columns, those of the first 32 rows first: uint8_t
 *                    exponent[16], uint64_t at (of its data, bytes from the header's begin), uint64_t raw (0 or 1);
 *                    up to a multiple of 64 bytes
 *   3,072 bytes each the data of a block with at most sixteen exponents: for each two pairs of columns, w = 0, 2, .. 30,
 *                    64 bytes of nibbles, pair w's low and pair w + 1's high, then 64 bytes of sign (bit 7) and mantissa
 *                    (bits 0..6) for each pair. Of a pair, row r's column c lies at r % 16 / 4 * 16 + r / 16 * 8 + r % 4 * 2
 *                    + c % 2.
 *   4,096 bytes      instead, of any other block (raw): the weights as they are, [32 pairs of columns][32 rows][2]
 *
 * `packed` is aligned to 64 bytes. Where a struct below takes one beside `weight`, `weight` is not looked at and may be
 * NULL; results have the same bits. Its content is trusted: it must come from atts_pack_weight_cpu. */
typedef struct atts_pack_weight_params {
  uint64_t struct_size;    /* sizeof(atts_pack_weight_params) */
  const uint16_t* weight;  /* [out_features, in_features] */
  void* packed;            /* written; not looked at by atts_pack_weight_cpu_bytes */
  uint64_t packed_bytes;   /* room there; ATTS_ERROR_WORKSPACE where it is less than atts_pack_weight_cpu_bytes says */
  int64_t out_features, in_features;
  int32_t threads;         /* 1 or more */
} atts_pack_weight_params;

/* The way back; exact for all 65,536 values. ATTS_ERROR_PACKED where `packed` is not a matrix of these sizes. */
typedef struct atts_unpack_weight_params {
  uint64_t struct_size;  /* sizeof(atts_unpack_weight_params) */
  const void* packed;
  uint16_t* weight;      /* [out_features, in_features], written */
  int64_t out_features, in_features;
  int32_t threads;       /* 1 or more */
} atts_unpack_weight_params;

/* A dense layer: out = x weight^T + bias, summed in fp32 and rounded once. This struct and the next six are for the host
 * alone; their dtype is ATTS_FLOAT32 or ATTS_BFLOAT16, else ATTS_ERROR_DTYPE. AVX-512, AVX2 or plain code, as the
 * processor has it. */
typedef struct atts_linear_params {
  uint64_t struct_size; /* sizeof(atts_linear_params) */
  const void* x;        /* [rows, in_features] of dtype */
  const void* weight;   /* [out_features, in_features] of dtype */
  const void* packed;   /* optional, in bfloat16 (else ATTS_ERROR_PACKED): weight, packed */
  const void* bias;     /* [out_features] of dtype, or NULL */
  void* out;            /* [rows, out_features] of dtype, written; must not overlap x */
  int64_t rows;         /* 0 or more */
  int64_t in_features, out_features; /* 1 or more */
  int32_t dtype;        /* atts_dtype of every array */
  int32_t threads;      /* 1 or more */
} atts_linear_params;

/* logprob[i] = log softmax(hidden weight^T)[i, ids[i]], logits in fp32, never rounded. NaN where a row is not finite. */
typedef struct atts_score_tokens_params {
  uint64_t struct_size;    /* sizeof(atts_score_tokens_params) */
  const void* hidden;      /* [rows, width] of dtype */
  const void* weight;      /* [vocab, width] of dtype */
  const void* packed;      /* optional, in bfloat16: weight, packed */
  const int64_t* ids;      /* [rows], 0..vocab-1 */
  float* logprob;          /* [rows], written */
  int64_t rows, width, vocab;
  int32_t dtype;           /* atts_dtype of hidden and weight */
  int32_t threads;         /* 1 or more */
} atts_score_tokens_params;

/* Causal attention over a paged cache, softmax in fp32. Query rows cu_q[b] .. cu_q[b+1]-1 are the last positions of
 * sequence b's kv_len[b] tokens; token t of it lies in slot t % page of page block_table[b, t / page]. */
typedef struct atts_attention_params {
  uint64_t struct_size;        /* sizeof(atts_attention_params) */
  const void* q;               /* [rows, heads, head_dim] of dtype */
  const void* kv;              /* [2, pages, page, kv_heads, head_dim] of dtype, keys and then values */
  const int32_t* block_table;  /* [batch, table_width] */
  const int32_t* cu_q;         /* [batch + 1], from 0 to rows */
  const int32_t* kv_len;       /* [batch], the queries' own tokens included */
  void* out;                   /* [rows, heads, head_dim] of dtype, written */
  int64_t rows, batch, table_width, pages, page;
  int64_t heads, kv_heads;     /* heads is a multiple of kv_heads */
  int64_t head_dim;            /* a multiple of 16 */
  float scale;
  int32_t dtype;               /* atts_dtype of q, kv and out */
  int32_t threads;             /* 1 or more */
} atts_attention_params;

/* out = y / sqrt(mean(y^2) + eps), rounded, times weight, rounded; y is x, or x + delta, rounded and kept in sum. */
typedef struct atts_rms_norm_params {
  uint64_t struct_size;  /* sizeof(atts_rms_norm_params) */
  const void* x;         /* [rows, width] of dtype, rows x_stride apart */
  const void* delta;     /* [rows, width] of dtype, dense, or NULL */
  const void* weight;    /* [width] of dtype */
  void* sum;             /* [rows, width] of dtype, dense, written; NULL where delta is */
  void* out;             /* [rows, width] of dtype, dense, written */
  int64_t rows, width, x_stride;
  float eps;
  int32_t dtype;         /* atts_dtype of every array */
  int32_t threads;       /* 1 or more */
} atts_rms_norm_params;

/* out = gate / (1 + exp(-gate)) * up, in fp32, rounded once. */
typedef struct atts_silu_mul_params {
  uint64_t struct_size;  /* sizeof(atts_silu_mul_params) */
  const void* gate;      /* [rows, width] of dtype, rows gate_stride apart */
  const void* up;        /* [rows, width] of dtype, rows up_stride apart */
  void* out;             /* [rows, width] of dtype, dense, written */
  int64_t rows, width, gate_stride, up_stride;
  int32_t dtype;         /* atts_dtype of every array */
  int32_t threads;       /* 1 or more */
} atts_silu_mul_params;

/* Rotary embedding: elements i and i + head_dim / 2 of a head turn together. Heads of a row lie side by side. */
typedef struct atts_rope_params {
  uint64_t struct_size;  /* sizeof(atts_rope_params) */
  const void* x;         /* [rows, heads, head_dim] of dtype, rows row_stride apart */
  const float* cosine;   /* [rows, head_dim / 2], dense */
  const float* sine;     /* [rows, head_dim / 2], dense */
  void* out;             /* [rows, heads, head_dim] of dtype, dense, written */
  int64_t rows, heads, head_dim, row_stride;
  int32_t dtype;         /* atts_dtype of x and out */
  int32_t threads;       /* 1 or more */
} atts_rope_params;

/* Weights of one block of a decoder, dense, of its dtype. */
typedef struct atts_decoder_layer {
  const void* attn_norm;      /* [hidden] */
  const void* qkv;            /* [(heads + 2 kv_heads) head_dim, hidden]: rows of q, then of k, then of v */
  const void* qkv_bias;       /* optional: [(heads + 2 kv_heads) head_dim] */
  const void* q_norm;         /* optional: [head_dim], for each head of q */
  const void* k_norm;         /* [head_dim]; NULL where q_norm is */
  const void* out;            /* [hidden, heads head_dim] */
  const void* mlp_norm;       /* [hidden] */
  const void* gate_up;        /* [2 inner, hidden]: rows of the gate, then those that it is multiplied with */
  const void* down;           /* [hidden, inner] */
  const void* qkv_packed;     /* optional, in bfloat16, as the next three: the matrix of that name, packed */
  const void* out_packed;
  const void* gate_up_packed;
  const void* down_packed;
} atts_decoder_layer;

/* A forward pass of a decoder, from token ids to hidden states behind the last norm: a Llama block as the ops of this
 * header compute it one by one (rms_norm, linear, rope, kv_append, attention, silu_mul), with the same bits. Rows
 * cu_q[b] .. cu_q[b+1]-1 are the last positions of sequence b's kv_len[b] tokens; the key and value of a row at position
 * t go to slot t % page of page block_table[b, t / page]. No two rows share a slot. */
typedef struct atts_decoder_params {
  uint64_t struct_size;             /* sizeof(atts_decoder_params) */
  const atts_decoder_layer* layer;  /* [layers] */
  const void* embed;                /* [vocab, hidden] of dtype */
  const void* norm;                 /* [hidden] of dtype, behind the last block */
  const float* cosine;              /* [max_positions, head_dim / 2] */
  const float* sine;                /* [max_positions, head_dim / 2] */
  const int64_t* ids;               /* [rows], 0..vocab-1 */
  const int64_t* positions;         /* [rows], 0..max_positions-1 */
  const int32_t* block_table;       /* [batch, table_width] */
  const int32_t* cu_q;              /* [batch + 1], ascending from 0 to rows */
  const int32_t* kv_len;            /* [batch], the new tokens included */
  void* kv;                         /* [layers, 2, pages, page, kv_heads, head_dim] of dtype, changed */
  void* out;                        /* [rows, hidden] of dtype, written */
  void* workspace;                  /* see atts_decoder_cpu_workspace */
  uint64_t workspace_bytes;
  int64_t rows, batch, table_width; /* 0 or more */
  int64_t pages, page;              /* 1 or more */
  int64_t layers, vocab, hidden;    /* 1 or more */
  int64_t inner;                    /* width of the MLP, 1 or more */
  int64_t heads, kv_heads;          /* heads is a multiple of kv_heads */
  int64_t head_dim;                 /* a multiple of 16 */
  int64_t max_positions;            /* 1 or more */
  float eps;
  float scale;                      /* of attention's scores: head_dim^-1/2 */
  int32_t dtype;                    /* atts_dtype of the weights, of kv and of out */
  int32_t threads;                  /* 1 or more */
} atts_decoder_params;

/* k and v of `rows` tokens to their slots of one layer's cache; where cosine is given, k, and q where it is given, are
 * turned on the way: elements i and i + head_dim / 2 of a head together, in fp32, each operation rounded. Exact.
 *
 * A slot is page * (tokens of a page) + offset. Either `slots` names them, or they follow from the block table: rows
 * cu_q[b] .. cu_q[b+1]-1 are the last positions of sequence b's kv_len[b] tokens, and token t of it lies in slot t %
 * page of page block_table[b, t / page]. Two rows must not share a slot: which of them stays is not defined.
 *
 * A row of slot -1 is padding and writes nothing, to q_out neither. On a device the same goes for rows behind
 * cu_q[batch], and for those whose slot or page is outside the cache, which is an error. */
typedef struct atts_kv_append_params {
  uint64_t struct_size;        /* sizeof(atts_kv_append_params) */
  const void* k;               /* [rows, kv_heads, head_dim] of dtype, with strides */
  const void* v;               /* [rows, kv_heads, head_dim] of dtype, with strides */
  void* kv;                    /* [2, slot_count, kv_heads, head_dim] of dtype, keys and then values, changed */
  const void* q;               /* optional: [rows, heads, head_dim] of dtype, with strides; needs cosine */
  void* q_out;                 /* [rows, heads, head_dim], with strides, written; may be q itself. NULL where q is */
  const float* cosine;         /* optional: [rows, head_dim / 2] */
  const float* sine;           /* [rows, head_dim / 2]; NULL where cosine is */
  const int64_t* slots;        /* [rows], -1..slot_count-1; NULL: they follow from the next three */
  const int32_t* block_table;  /* [batch, table_width]; NULL where slots are given, as the next two */
  const int32_t* cu_q;         /* [batch + 1], ascending from 0 to rows (on a device: to rows or less) */
  const int32_t* kv_len;       /* [batch], the new tokens included */
  int32_t* error;              /* optional, device: [1], see the top */
  int64_t rows;                /* 0 or more */
  int64_t kv_heads, head_dim;  /* 1 or more; head_dim even where cosine is given */
  int64_t heads;               /* of q: 1 or more, 0 where q is NULL */
  int64_t k_stride, k_head_stride;
  int64_t v_stride, v_head_stride;
  int64_t q_stride, q_head_stride;
  int64_t q_out_stride, q_out_head_stride;
  int64_t slot_count;          /* 0 or more: pages of the pool * page */
  int64_t page;                /* tokens of a page: 1 or more, a divisor of slot_count; not looked at with slots */
  int64_t batch, table_width;  /* 0 where slots are given */
  int32_t dtype;               /* atts_dtype of k, v, q, q_out and kv */
} atts_kv_append_params;

/* Pages src[i] to pages dst[i] in every layer of a cache, all layers and pages in one launch. In one call no page is a
 * destination twice, nor both a source and a destination: the host form refuses it with ATTS_ERROR_OVERLAP, on a device
 * the content of such a page is not defined. On a device a pair with a page outside the pool is left out. */
typedef struct atts_kv_copy_pages_params {
  uint64_t struct_size;   /* sizeof(atts_kv_copy_pages_params) */
  void* kv;               /* [layers, 2, pages, page, kv_heads, head_dim] of dtype, changed */
  const int64_t* src;     /* [count], 0..pages-1 */
  const int64_t* dst;     /* [count], 0..pages-1 */
  int32_t* error;         /* optional, device: [1], see the top */
  int64_t layers, pages;  /* 1 or more */
  int64_t page;           /* tokens of a page, 1 or more */
  int64_t kv_heads, head_dim;
  int64_t count;          /* 0 or more */
  int32_t dtype;          /* atts_dtype of kv */
} atts_kv_copy_pages_params;

/* Pages of a cache to a dense array in which a page of all layers lies in one piece, or the way back: for one large
 * copy to the host, another device or another pool. When pages are written, each must be named once:
 * ATTS_ERROR_OVERLAP. On a device a page outside the pool is left out. */
typedef struct atts_kv_gather_params {
  uint64_t struct_size;     /* sizeof(atts_kv_gather_params) */
  void* kv;                 /* [layers, 2, pages, page, kv_heads, head_dim] of dtype; changed where scatter is 1 */
  void* dense;              /* [count, layers, 2, page, kv_heads, head_dim] of dtype; written where scatter is 0 */
  const int64_t* page_ids;  /* [count], 0..pages-1 */
  int32_t* error;           /* optional, device: [1], see the top */
  int64_t layers, pages;    /* 1 or more */
  int64_t page;             /* tokens of a page, 1 or more */
  int64_t kv_heads, head_dim;
  int64_t count;            /* 0 or more */
  int32_t dtype;            /* atts_dtype of kv and dense */
  int32_t scatter;          /* 0: kv to dense; 1: dense to kv */
} atts_kv_gather_params;

/* Pages of a cache to slots of a pool in host memory, or back: page_ids[i] <-> slots[i]. What is written must be named
 * once only. `host`, `page_ids` and `slots` are host memory for the device form too; both lists are checked there as
 * well, and may go when the call returns. `host` must be pinned there (ATTS_ERROR_DEVICE), and is the host's again when
 * the stream has come so far. No kernel runs: the copies are queued in batches where the driver has cuMemcpyBatchAsync
 * (12.8 on) and `stream` is neither the legacy default stream nor being captured, and page by page otherwise. */
typedef struct atts_kv_swap_params {
  uint64_t struct_size;     /* sizeof(atts_kv_swap_params) */
  void* kv;                 /* [layers, 2, pages, page, kv_heads, head_dim] of dtype; changed where to_host is 0 */
  void* host;               /* [host_slots, layers, 2, page, kv_heads, head_dim] of dtype; changed where to_host is 1 */
  const int64_t* page_ids;  /* [count], 0..pages-1 */
  const int64_t* slots;     /* [count], 0..host_slots-1 */
  int64_t layers, pages;    /* 1 or more */
  int64_t page;             /* tokens of a page, 1 or more */
  int64_t kv_heads, head_dim;
  int64_t host_slots;       /* 1 or more */
  int64_t count;            /* 0 or more */
  int32_t dtype;            /* atts_dtype of kv and host */
  int32_t to_host;          /* 1: kv to host; 0: host to kv */
} atts_kv_swap_params;

/* One token per row of logits by the Gumbel-max trick; the noise of a token is a hash of (seed, position, id). A row
 * with NaN or without a finite largest logit gives -1. */
typedef struct atts_sample_params {
  uint64_t struct_size;      /* sizeof(atts_sample_params) */
  const void* logits;        /* [rows, vocab] of dtype, rows logits_stride apart */
  const float* temperature;  /* [rows], 0: the largest, the first of ties */
  const int64_t* top_k;      /* [rows], 0: off */
  const float* top_p;        /* [rows], 1: off */
  const float* min_p;        /* [rows], 0: off */
  const int64_t* seed;       /* [rows] */
  const int64_t* position;   /* [rows] */
  int64_t* ids;              /* [rows], written */
  int64_t rows, vocab, logits_stride;
  int32_t dtype;             /* atts_dtype of logits: ATTS_FLOAT32 or ATTS_BFLOAT16 */
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

/* Have the CPU kernels of one instruction set run from the next call on, in every thread; NULL: the best that the
 * processor has. For tests and comparisons: results of two instruction sets agree to rounding and not to the bit. */
ATTS_API int atts_use_cpu_isa(const char* isa);

/* On the host; the first seven have a form for the device below. */
ATTS_API int atts_gate_cpu(const atts_gate_params* params);
ATTS_API int atts_span_mean_cpu(const atts_span_mean_params* params);
ATTS_API int atts_score_logits_cpu(const atts_score_logits_params* params);
ATTS_API int atts_kv_append_cpu(const atts_kv_append_params* params);
ATTS_API int atts_kv_copy_pages_cpu(const atts_kv_copy_pages_params* params);
ATTS_API int atts_kv_gather_cpu(const atts_kv_gather_params* params);
ATTS_API int atts_kv_swap_cpu(const atts_kv_swap_params* params);
ATTS_API int atts_linear_cpu(const atts_linear_params* params);
ATTS_API int atts_pack_weight_cpu(const atts_pack_weight_params* params);
ATTS_API int atts_unpack_weight_cpu(const atts_unpack_weight_params* params);
ATTS_API int atts_score_tokens_cpu(const atts_score_tokens_params* params);
ATTS_API int atts_attention_cpu(const atts_attention_params* params);
ATTS_API int atts_rms_norm_cpu(const atts_rms_norm_params* params);
ATTS_API int atts_silu_mul_cpu(const atts_silu_mul_params* params);
ATTS_API int atts_rope_cpu(const atts_rope_params* params);
ATTS_API int atts_sample_cpu(const atts_sample_params* params);
ATTS_API int atts_decoder_cpu(const atts_decoder_params* params);

/* On the current device; ATTS_ERROR_NO_CUDA from a library without CUDA. */
ATTS_API int atts_gate(const atts_gate_params* params, void* stream);
ATTS_API int atts_span_mean(const atts_span_mean_params* params, void* stream);
ATTS_API int atts_score_logits(const atts_score_logits_params* params, void* stream);
ATTS_API int atts_kv_append(const atts_kv_append_params* params, void* stream);
ATTS_API int atts_kv_copy_pages(const atts_kv_copy_pages_params* params, void* stream);
ATTS_API int atts_kv_gather(const atts_kv_gather_params* params, void* stream);
ATTS_API int atts_kv_swap(const atts_kv_swap_params* params, void* stream);

/* Bytes of device memory that make the op quick with these sizes; arrays need not be set. 0: it gains nothing from one.
 * One that serves several sizes is as large as the largest answer. The caller aligns it to 16 bytes, sets it to 0 once,
 * and gives it to one op only and to one call at a time, in stream order; every call leaves it ready for the next. */
ATTS_API int atts_gate_workspace(const atts_gate_params* params, uint64_t* bytes);
ATTS_API int atts_score_logits_workspace(const atts_score_logits_params* params, uint64_t* bytes);

/* Bytes of host memory that atts_decoder_cpu works in with these sizes; arrays need not be set. More rows need more. The
 * caller aligns it to 16 bytes and gives it to one call at a time; what it holds before and after means nothing. */
ATTS_API int atts_decoder_cpu_workspace(const atts_decoder_params* params, uint64_t* bytes);

/* Bytes of the packed form of `weight`, which is read; `packed` need not be set. */
ATTS_API int atts_pack_weight_cpu_bytes(const atts_pack_weight_params* params, uint64_t* bytes);

#ifdef __cplusplus
}
#endif

#endif /* ATTS_ATTS_H_ */
