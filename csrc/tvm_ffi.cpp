// The CUDA entry points for Python through apache-tvm-ffi: tensors come by DLPack, so that one build serves every
// torch, and the launch goes to the stream that the caller's framework has current on the tensors' device.
//
// Checked here is what a params struct cannot show: dimensions, dtypes, the device, and that arrays are dense where the
// struct has no stride for them. Everything else is the library's to check; its status comes back as an error.
#include <cuda_runtime_api.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <initializer_list>

#include "atts/atts.h"

// A test of this file puts the library's host forms behind it.
#ifndef ATTS_TVM_FFI_DEVICE
#define ATTS_TVM_FFI_DEVICE kDLCUDA
#endif

namespace {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int64_t kAny = -1;

struct Dtype {
  uint8_t code;
  uint8_t bits;
  const char* name;
};
constexpr Dtype kFloat32{kDLFloat, 32, "float32"};
constexpr Dtype kFloat64{kDLFloat, 64, "float64"};
constexpr Dtype kInt64{kDLInt, 64, "int64"};
constexpr Dtype kBool{kDLBool, 8, "bool"};

bool is(DLDataType found, const Dtype& wanted) {
  return found.code == wanted.code && found.bits == wanted.bits && found.lanes == 1;
}

atts_dtype floating(const char* op, const char* name, const TensorView& x) {
  const DLDataType found = x.dtype();
  if (is(found, kFloat32)) return ATTS_FLOAT32;
  if (is(found, {kDLFloat, 16, "float16"})) return ATTS_FLOAT16;
  if (is(found, {kDLBfloat, 16, "bfloat16"})) return ATTS_BFLOAT16;
  TVM_FFI_THROW(ValueError) << op << ": " << name << " must be float32, float16 or bfloat16";
  TVM_FFI_UNREACHABLE();
}

// One call of one op: the device of its first tensor, which all others share, is current as long as it lives.
class Call {
 public:
  Call(const char* op, const TensorView& first) : op_(op), device_(first.device()) {
    if (device_.device_type != ATTS_TVM_FFI_DEVICE) {
      TVM_FFI_THROW(ValueError) << op << ": the CUDA kernel needs tensors on a CUDA device";
    }
    require(cudaGetDevice(&before_));
    if (before_ != device_.device_id) require(cudaSetDevice(device_.device_id));
  }
  ~Call() {
    if (before_ != device_.device_id) cudaSetDevice(before_);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const char* op() const { return op_; }

  void* stream() const { return TVMFFIEnvGetStream(device_.device_type, device_.device_id); }

  // Address of a tensor on the call's device, of these sizes (kAny: any), whatever its strides and dtype.
  void* strided(const char* name, const TensorView& x, std::initializer_list<int64_t> shape) const {
    if (x.device().device_type != device_.device_type || x.device().device_id != device_.device_id) {
      TVM_FFI_THROW(ValueError) << op_ << ": " << name << " is not on cuda:" << device_.device_id << " like the others";
    }
    return anywhere(name, x, shape);
  }

  // The same of a dense tensor.
  void* dense(const char* name, const TensorView& x, std::initializer_list<int64_t> shape) const {
    contiguous(name, x);
    return strided(name, x, shape);
  }

  template <typename T>
  T* dense(const char* name, const TensorView& x, std::initializer_list<int64_t> shape, const Dtype& dtype) const {
    typed(name, x, dtype);
    return static_cast<T*>(dense(name, x, shape));
  }

  // Address of a dense tensor in host memory.
  void* on_host(const char* name, const TensorView& x, std::initializer_list<int64_t> shape) const {
    if (x.device().device_type != kDLCPU && x.device().device_type != kDLCUDAHost) {
      TVM_FFI_THROW(ValueError) << op_ << ": " << name << " belongs on the CPU";
    }
    contiguous(name, x);
    return anywhere(name, x, shape);
  }

  template <typename T>
  T* on_host(const char* name, const TensorView& x, std::initializer_list<int64_t> shape, const Dtype& dtype) const {
    typed(name, x, dtype);
    return static_cast<T*>(on_host(name, x, shape));
  }

  void same_dtype(const char* name, const TensorView& x, const TensorView& like) const {
    const DLDataType found = x.dtype(), wanted = like.dtype();
    if (found.code != wanted.code || found.bits != wanted.bits || found.lanes != wanted.lanes) {
      TVM_FFI_THROW(ValueError) << op_ << ": the dtype of " << name << " differs from that of the cache";
    }
  }

  // The struct has no stride for the last dimension.
  void rows_without_gaps(const char* name, const TensorView& x) const {
    if (x.numel() > 0 && x.size(-1) > 1 && x.stride(-1) != 1) {
      TVM_FFI_THROW(ValueError) << op_ << ": the rows of " << name << " have gaps: its last stride is " << x.stride(-1);
    }
  }

  // Address of rows that go to or come with the cache.
  void* rows(const char* name, const TensorView& x, std::initializer_list<int64_t> shape,
             const TensorView& cache) const {
    same_dtype(name, x, cache);
    rows_without_gaps(name, x);
    return strided(name, x, shape);
  }

  void finish(int status) const {
    if (status == ATTS_OK) return;
    if (status == ATTS_ERROR_CUDA) TVM_FFI_THROW(RuntimeError) << op_ << ": " << atts_strerror(status);
    TVM_FFI_THROW(ValueError) << op_ << ": " << atts_strerror(status);
  }

 private:
  void require(cudaError_t code) const {
    if (code != cudaSuccess) TVM_FFI_THROW(RuntimeError) << op_ << ": " << cudaGetErrorString(code);
  }

  void contiguous(const char* name, const TensorView& x) const {
    if (x.numel() > 0 && !x.IsContiguous()) TVM_FFI_THROW(ValueError) << op_ << ": " << name << " must be contiguous";
  }

  void typed(const char* name, const TensorView& x, const Dtype& dtype) const {
    if (!is(x.dtype(), dtype)) TVM_FFI_THROW(ValueError) << op_ << ": " << name << " must be " << dtype.name;
  }

  void* anywhere(const char* name, const TensorView& x, std::initializer_list<int64_t> shape) const {
    bool fits = x.ndim() == static_cast<int32_t>(shape.size());
    int32_t at = 0;
    for (const int64_t size : shape) {
      if (fits && size != kAny && x.size(at) != size) fits = false;
      ++at;
    }
    if (!fits) TVM_FFI_THROW(ValueError) << op_ << ": the shape of " << name << " does not fit the other tensors";
    return static_cast<char*>(x.data_ptr()) + x.byte_offset();
  }

  const char* op_;
  DLDevice device_;
  int before_ = 0;
};

template <typename Params>
Params zeroed() {
  Params params{};
  params.struct_size = sizeof(Params);
  return params;
}

// A workspace is bytes; torch gives them as int8 or uint8, here they need no type.
template <typename Params>
void take_workspace(const Call& call, Params& params, const Optional<TensorView>& workspace) {
  if (!workspace.has_value()) return;
  params.workspace = call.dense("workspace", workspace.value(), {kAny});
  params.workspace_bytes = static_cast<uint64_t>(workspace.value().numel() * workspace.value().dtype().bits / 8);
}

int64_t gate_workspace(TensorView score, TensorView ring) {
  auto g = zeroed<atts_gate_params>();
  g.batch = score.size(0);
  g.keys = ring.size(0);
  g.capacity = ring.size(1);
  uint64_t bytes = 0;
  if (const int status = atts_gate_workspace(&g, &bytes)) {
    TVM_FFI_THROW(ValueError) << "gate: " << atts_strerror(status);
  }
  return static_cast<int64_t>(bytes);
}

void gate(TensorView score, TensorView key, TensorView ring, TensorView size, TensorView head, TensorView level,
          TensorView u, TensorView insert, TensorView greater, TensorView ties, TensorView n, TensorView takeover,
          TensorView p, Optional<TensorView> workspace) {
  const Call call("gate", score);
  auto g = zeroed<atts_gate_params>();
  g.score = call.dense<float>("score", score, {kAny}, kFloat32);
  g.ring = call.dense<float>("ring", ring, {kAny, kAny}, kFloat32);
  g.batch = score.size(0);
  g.keys = ring.size(0);
  g.capacity = ring.size(1);
  g.key = call.dense<int64_t>("key", key, {g.batch}, kInt64);
  g.level = call.dense<int64_t>("level", level, {g.batch}, kInt64);
  g.u = call.dense<int64_t>("u", u, {g.batch}, kInt64);
  g.insert = call.dense<uint8_t>("insert", insert, {g.batch}, kBool);
  g.size = call.dense<int64_t>("size", size, {g.keys}, kInt64);
  g.head = call.dense<int64_t>("head", head, {g.keys}, kInt64);
  g.greater = call.dense<int64_t>("greater", greater, {g.batch}, kInt64);
  g.ties = call.dense<int64_t>("ties", ties, {g.batch}, kInt64);
  g.n = call.dense<int64_t>("n", n, {g.batch}, kInt64);
  g.takeover = call.dense<uint8_t>("takeover", takeover, {g.batch}, kBool);
  g.p = call.dense<double>("p", p, {g.batch}, kFloat64);
  take_workspace(call, g, workspace);
  call.finish(atts_gate(&g, call.stream()));
}

void span_mean(TensorView logprob, TensorView cu_seqlens, TensorView score, TensorView sum) {
  const Call call("span_mean", logprob);
  auto s = zeroed<atts_span_mean_params>();
  s.logprob = call.dense<float>("logprob", logprob, {kAny}, kFloat32);
  s.cu_seqlens = call.dense<int64_t>("cu_seqlens", cu_seqlens, {kAny}, kInt64);
  s.tokens = logprob.size(0);
  s.batch = cu_seqlens.size(0) - 1;
  s.score = call.dense<float>("score", score, {s.batch}, kFloat32);
  s.sum = call.dense<double>("sum", sum, {s.batch}, kFloat64);
  call.finish(atts_span_mean(&s, call.stream()));
}

// What the sizes need of logits[rows, vocab] themselves; also where they are not on a device.
void take_logits(const char* op, atts_score_logits_params& params, const TensorView& logits) {
  params.dtype = floating(op, "logits", logits);
  if (logits.ndim() != 2) TVM_FFI_THROW(ValueError) << op << ": logits must have two dimensions";
  params.rows = logits.size(0);
  params.vocab = logits.size(1);
  params.logits_stride = params.rows > 1 ? logits.stride(0) : params.vocab;
  params.threads = 1;
}

int64_t score_logits_workspace(TensorView logits) {
  auto s = zeroed<atts_score_logits_params>();
  take_logits("score_logits", s, logits);
  uint64_t bytes = 0;
  if (const int status = atts_score_logits_workspace(&s, &bytes)) {
    TVM_FFI_THROW(ValueError) << "score_logits: " << atts_strerror(status);
  }
  return static_cast<int64_t>(bytes);
}

void score_logits(TensorView logits, TensorView ids, TensorView logprob, Optional<TensorView> workspace) {
  const Call call("score_logits", logits);
  auto s = zeroed<atts_score_logits_params>();
  take_logits("score_logits", s, logits);
  call.rows_without_gaps("logits", logits);
  s.logits = call.strided("logits", logits, {kAny, kAny});
  s.ids = call.dense<int64_t>("ids", ids, {s.rows}, kInt64);
  s.logprob = call.dense<float>("logprob", logprob, {s.rows}, kFloat32);
  take_workspace(call, s, workspace);
  call.finish(atts_score_logits(&s, call.stream()));
}

// What both appends have in common: keys, values, the cache and the slots.
void take_append(const Call& call, atts_kv_append_params& params, const TensorView& k, const TensorView& v,
                 const TensorView& kv_layer, const TensorView& slots) {
  params.dtype = floating(call.op(), "kv_layer", kv_layer);
  params.kv = call.dense("kv_layer", kv_layer, {2, kAny, kAny, kAny, kAny});
  params.page = kv_layer.size(2);
  params.slot_count = kv_layer.size(1) * params.page;
  params.kv_heads = kv_layer.size(3);
  params.head_dim = kv_layer.size(4);
  params.slots = call.dense<int64_t>("slots", slots, {kAny}, kInt64);
  params.rows = slots.size(0);
  params.k = call.rows("k", k, {params.rows, params.kv_heads, params.head_dim}, kv_layer);
  params.v = call.rows("v", v, {params.rows, params.kv_heads, params.head_dim}, kv_layer);
  params.k_stride = k.stride(0);
  params.k_head_stride = k.stride(1);
  params.v_stride = v.stride(0);
  params.v_head_stride = v.stride(1);
}

void kv_append(TensorView k, TensorView v, TensorView kv_layer, TensorView slots) {
  const Call call("kv_append", kv_layer);
  auto a = zeroed<atts_kv_append_params>();
  take_append(call, a, k, v, kv_layer, slots);
  call.finish(atts_kv_append(&a, call.stream()));
}

void rope_kv_append(TensorView q, TensorView k, TensorView v, TensorView cosine, TensorView sine, TensorView kv_layer,
                    TensorView slots, TensorView q_out) {
  const Call call("rope_kv_append", kv_layer);
  auto a = zeroed<atts_kv_append_params>();
  take_append(call, a, k, v, kv_layer, slots);
  a.cosine = call.dense<float>("cos", cosine, {a.rows, a.head_dim / 2}, kFloat32);
  a.sine = call.dense<float>("sin", sine, {a.rows, a.head_dim / 2}, kFloat32);
  a.q = call.rows("q", q, {a.rows, kAny, a.head_dim}, kv_layer);
  a.heads = q.size(1);
  a.q_out = call.rows("q_out", q_out, {a.rows, a.heads, a.head_dim}, kv_layer);
  a.q_stride = q.stride(0);
  a.q_head_stride = q.stride(1);
  a.q_out_stride = q_out.stride(0);
  a.q_out_head_stride = q_out.stride(1);
  call.finish(atts_kv_append(&a, call.stream()));
}

// The sizes of kv[layers, 2, pages, page, kv_heads, head_dim], alike in the three structs that move pages.
template <typename Params>
void take_cache(const Call& call, Params& params, const TensorView& kv) {
  params.dtype = floating(call.op(), "kv", kv);
  params.kv = call.dense("kv", kv, {kAny, 2, kAny, kAny, kAny, kAny});
  params.layers = kv.size(0);
  params.pages = kv.size(2);
  params.page = kv.size(3);
  params.kv_heads = kv.size(4);
  params.head_dim = kv.size(5);
}

void kv_copy_pages(TensorView kv, TensorView src, TensorView dst) {
  const Call call("kv_copy_pages", kv);
  auto c = zeroed<atts_kv_copy_pages_params>();
  take_cache(call, c, kv);
  c.src = call.dense<int64_t>("src", src, {kAny}, kInt64);
  c.count = src.size(0);
  c.dst = call.dense<int64_t>("dst", dst, {c.count}, kInt64);
  call.finish(atts_kv_copy_pages(&c, call.stream()));
}

void kv_gather(TensorView kv, TensorView dense, TensorView page_ids, bool scatter) {
  const Call call(scatter ? "kv_scatter" : "kv_gather", kv);
  auto g = zeroed<atts_kv_gather_params>();
  take_cache(call, g, kv);
  g.page_ids = call.dense<int64_t>("page_ids", page_ids, {kAny}, kInt64);
  g.count = page_ids.size(0);
  call.same_dtype("dense", dense, kv);
  g.dense = call.dense("dense", dense, {g.count, g.layers, 2, g.page, g.kv_heads, g.head_dim});
  g.scatter = scatter;
  call.finish(atts_kv_gather(&g, call.stream()));
}

void kv_swap(TensorView kv, TensorView host, TensorView page_ids, TensorView slots, bool to_host) {
  const Call call("kv_swap", kv);
  auto s = zeroed<atts_kv_swap_params>();
  take_cache(call, s, kv);
  call.same_dtype("host", host, kv);
  s.host = call.on_host("host", host, {kAny, s.layers, 2, s.page, s.kv_heads, s.head_dim});
  s.host_slots = host.size(0);
  s.page_ids = call.on_host<int64_t>("page_ids", page_ids, {kAny}, kInt64);
  s.count = page_ids.size(0);
  s.slots = call.on_host<int64_t>("slots", slots, {s.count}, kInt64);
  s.to_host = to_host;
  call.finish(atts_kv_swap(&s, call.stream()));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate, gate)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate_workspace, gate_workspace)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_append, kv_append)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_copy_pages, kv_copy_pages)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_gather, kv_gather)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_swap, kv_swap)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_kv_append, rope_kv_append)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(score_logits, score_logits)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(score_logits_workspace, score_logits_workspace)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(span_mean, span_mean)
