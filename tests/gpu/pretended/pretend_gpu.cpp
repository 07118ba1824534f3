// A "cuda" device for a PyTorch without CUDA: a second region of main memory, computed on by the CPU's kernels.
// Tensors of different devices do not mix, as on a GPU; operations, copies, waits and bytes are counted.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>
#include <sstream>

namespace {
using namespace at;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using MaybeTensor = std::optional<Tensor>;
const Device GPU(kCUDA, 0);

// ---- Bytes, in blocks of 512 as CUDA's allocator counts them
std::atomic<int64_t> held{0}, peak{0}, limit{INT64_MAX};

int64_t rounded(int64_t bytes) { return (bytes + 511) / 512 * 512; }

void take(int64_t bytes) {
  bytes = rounded(bytes);
  if (held + bytes > limit)
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes (pretended)");
  int64_t now = held += bytes;
  int64_t most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {}
}

void give(int64_t bytes) { held -= rounded(bytes); }

struct Block {
  void* address;
  int64_t bytes;
};

void free_block(void* context) {
  auto block = (Block*)context;
  give(block->bytes);
  c10::free_cpu(block->address);
  delete block;
}

struct Memory final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &c10::detail::deleteNothing, GPU};
    take(bytes);
    void* address = c10::alloc_cpu(bytes);
    return {address, new Block{address, (int64_t)bytes}, &free_block, GPU};
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

// ---- What is counted, by name
std::mutex lock;
std::map<std::string, int64_t> counts;

void count(const std::string& what) {
  std::lock_guard<std::mutex> guard(lock);
  counts[what]++;
}

// The host waits for the device, which it must not do while a graph is captured
std::atomic<bool> capturing{false};

void wait(const std::string& what) {
  TORCH_CHECK(!capturing, "operation not permitted when stream is capturing (pretended): ", what);
  count("wait " + what);
}

std::string take_counts() {
  std::lock_guard<std::mutex> guard(lock);
  std::ostringstream out;
  for (auto& [what, times] : counts) out << what << "\t" << times << "\n";
  counts.clear();
  return out.str();
}

// ---- The same bytes as a tensor of the other device
struct Kept {
  c10::Storage storage;
  int64_t bytes;
};

void free_kept(void* context) {
  auto kept = (Kept*)context;
  give(kept->bytes);
  delete kept;
}

Tensor relabelled(const Tensor& x, bool gpu) {
  auto bytes = x.storage().nbytes();
  if (gpu) take(bytes);
  auto kept = new Kept{x.storage(), gpu ? (int64_t)bytes : 0};
  DataPtr pointer(kept->storage.mutable_data(), kept, &free_kept, gpu ? GPU : Device(kCPU));
  auto allocator = gpu ? (c10::Allocator*)&memory : c10::GetAllocator(c10::DeviceType::CPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(pointer), allocator, true);
  DispatchKeySet keys(gpu ? DispatchKey::CUDA : DispatchKey::CPU);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, x.dtype());
  auto impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  if (x.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return out;
}

Tensor on_cpu(const Tensor& x) { return relabelled(x, false); }
Tensor on_gpu(const Tensor& x) { return relabelled(x, true); }

Generator generator = at::detail::createCPUGenerator(67280421310721);

// ---- Every operation without a kernel of its own: the CPU's kernel
const std::set<std::string> INDEXING{
    "aten::index", "aten::_index_put_impl_", "aten::index_put_", "aten::index_put"};
// The host waits for their result, because it decides a shape or a branch
const std::set<std::string> WAITS{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::masked_select", "aten::unique_consecutive", "aten::bincount"};

bool is_number(const Tensor& x) { return x.device().is_cpu() && x.dim() == 0; }

// One call: its arguments moved to the CPU, and its results moved back
struct Call {
  std::string name;
  bool fills = false;                           // x[mask] = number, which becomes masked_fill: nothing is waited for
  std::vector<std::pair<Tensor, Tensor>> pairs; // A tensor of the GPU, and what stands for it on the CPU

  Tensor argument(const Tensor& x, bool index) {
    if (!x.defined()) return x;
    if (x.is_cuda()) {
      for (auto& [ours, theirs] : pairs)
        if (ours.is_same(x)) return theirs;
      pairs.emplace_back(x, on_cpu(x));
      return pairs.back().second;
    }
    bool written = INDEXING.count(name) && name != "aten::index";
    if (is_number(x)) {
      if (!index && written && !fills) wait("value from the host in " + name);
    } else
      TORCH_CHECK(index, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                  x.device(), "! (pretended, in ", name, ")");
    if (index) wait("index from the host in " + name);
    return x;
  }

  MaybeTensor optional_argument(const MaybeTensor& x) {
    if (!x || !x->defined()) return x;
    bool indexing = INDEXING.count(name);
    bool mask = x->scalar_type() == kBool || x->scalar_type() == kByte;
    // CUDA calls nonzero; what reads by a mask does so here as well, and is counted there
    if (indexing && x->is_cuda() && mask && name != "aten::index" && !fills) wait("mask as index in " + name);
    return argument(*x, indexing);
  }

  IValue moved(const IValue& value) {
    if (value.isTensor()) return argument(value.toTensor(), false);
    if (value.isTensorList()) {
      std::vector<Tensor> found;
      for (const Tensor& x : value.toTensorVector()) found.push_back(argument(x, false));
      return IValue(found);
    }
    if (value.isOptionalTensorList()) {
      c10::List<MaybeTensor> found;
      for (MaybeTensor x : value.toOptionalTensorList()) found.push_back(optional_argument(x));
      return IValue(found);
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return IValue(Device(kCPU));
    if (value.isGenerator())
      TORCH_CHECK(!value.toGenerator().device().is_cpu() || value.toGenerator() == generator,
                  "Expected a 'cuda' device type for generator but found 'cpu' (pretended, in ", name, ")");
    return value;
  }

  // What the kernel wrote to with out= may have a new size or new memory
  void update_sizes() {
    for (auto& [ours, theirs] : pairs) {
      auto to = ours.unsafeGetTensorImpl();
      auto from = theirs.unsafeGetTensorImpl();
      bool same_bytes = theirs.storage().nbytes() == ours.storage().nbytes();
      if (theirs.storage().data() != ours.storage().data() || !same_bytes)
        to->set_storage_keep_dtype(on_gpu(theirs).storage());
      if (to->sizes() != from->sizes() || to->strides() != from->strides())
        to->set_sizes_and_strides(from->sizes(), from->strides(), from->storage_offset());
    }
  }

  Tensor result(const Tensor& x) {
    if (!x.defined() || x.is_cuda()) return x;
    for (auto& [ours, theirs] : pairs) {
      if (theirs.is_same(x)) return ours;
      bool stored = x.has_storage() && theirs.has_storage();
      bool shared = stored && x.storage().unsafeGetStorageImpl() == theirs.storage().unsafeGetStorageImpl();
      TORCH_CHECK(!shared, name, " returns a view: it needs a kernel of its own");
    }
    return on_gpu(x);
  }
};

bool fills_by_mask(const IValue& indices, const IValue& value) {
  const Tensor& number = value.toTensor();
  if (number.numel() != 1 || !number.device().is_cpu()) return false;
  int masks = 0;
  for (MaybeTensor x : indices.toOptionalTensorList()) {
    if (!x || !x->defined()) continue;
    if ((x->scalar_type() != kBool && x->scalar_type() != kByte) || !x->is_cuda()) return false;
    masks++;
  }
  return masks == 1;
}

void check_layer_norm(const Tensor& x, const IValue& weight) { // CUDA's takes one type, the CPU's does not
  if (!weight.isTensor() || !weight.toTensor().defined()) return;
  auto type = weight.toTensor().scalar_type();
  TORCH_CHECK(type == x.scalar_type(), "expected scalar type ", x.scalar_type(), " but found ", type,
              " (pretended: layer_norm takes one type)");
}

void with_cpu_kernel(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call{schema.name()};
  const size_t n = schema.arguments().size();
  const size_t begin = stack->size() - n;
  if (call.name == "aten::_index_put_impl_") call.fills = fills_by_mask((*stack)[begin + 1], (*stack)[begin + 2]);
  for (size_t i = 0; i < n; i++) {
    IValue& value = (*stack)[begin + i];
    value = call.moved(value);
    if (value.isNone() && schema.arguments()[i].name() == "generator") value = IValue(generator);
  }
  if (call.name == "aten::native_layer_norm") check_layer_norm((*stack)[begin].toTensor(), (*stack)[begin + 2]);
  count("op " + call.name);
  if (WAITS.count(call.name)) wait(call.name);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  call.update_sizes();
  const size_t first = stack->size() - schema.returns().size();
  for (size_t i = first; i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) value = call.result(value.toTensor());
    else if (value.isTensorList()) {
      std::vector<Tensor> found;
      for (const Tensor& x : value.toTensorVector()) found.push_back(call.result(x));
      value = IValue(found);
    }
  }
}

// ---- Operations with a kernel of their own
Tensor new_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
                 std::optional<bool>, std::optional<MemoryFormat> format) {
  DispatchKeySet keys(DispatchKey::CUDA);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor new_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                   std::optional<Device>, std::optional<bool>) {
  DispatchKeySet keys(DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cuda() && from.is_cuda()) count("op aten::copy_");
  else {
    std::string way = to.is_cuda() ? "copy host to device" : "copy device to host";
    TORCH_CHECK(!capturing, "operation not permitted when stream is capturing (pretended): ", way);
    count(way);
    if (!non_blocking) wait(way);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor target = to.is_cuda() ? on_cpu(to) : to;
  target.copy_(from.is_cuda() ? on_cpu(from) : from);
  return to;
}

// Products of 16-bit matrices as float32: torch.mm(a, b, out_dtype=torch.float32), which the CPU does not have
void check_wide(const Tensor& a, const Tensor& b, ScalarType dtype) {
  TORCH_CHECK(a.is_cuda() && b.is_cuda(), "Expected all tensors to be on the same device (pretended, in mm.dtype)");
  auto type = a.scalar_type();
  bool half = type == kHalf || type == kBFloat16;
  TORCH_CHECK(b.scalar_type() == type, "expected m1 and m2 to have the same dtype (pretended)");
  TORCH_CHECK(dtype == type || (dtype == kFloat && half), "out_dtype must be the same as input dtype or fp32 for "
              "fp16/bf16 inputs (pretended)");
}

Tensor wide_product(const Tensor& a, const Tensor& b, ScalarType dtype) { // On the CPU
  check_wide(a, b, dtype);
  count("op aten::mm.dtype");
  at::AutoDispatchBelowADInplaceOrView below;
  return at::matmul(on_cpu(a).to(kFloat), on_cpu(b).to(kFloat)).to(dtype);
}

Tensor mm_dtype(const Tensor& a, const Tensor& b, ScalarType dtype) { return on_gpu(wide_product(a, b, dtype)); }

Tensor& mm_dtype_out(const Tensor& a, const Tensor& b, ScalarType dtype, Tensor& out) {
  TORCH_CHECK(out.is_cuda() && out.scalar_type() == dtype, "out must have out_dtype, and lie on the GPU (pretended)");
  Tensor found = wide_product(a, b, dtype);
  at::native::resize_(out, found.sizes());
  on_cpu(out).copy_(found);
  return out;
}

Tensor addmm_dtype(const Tensor& self, const Tensor& a, const Tensor& b, ScalarType dtype, const Scalar& beta,
                   const Scalar& alpha) {
  TORCH_CHECK(self.is_cuda(), "Expected all tensors to be on the same device (pretended, in addmm.dtype)");
  Tensor found = wide_product(a, b, kFloat);
  at::AutoDispatchBelowADInplaceOrView below;
  return on_gpu((on_cpu(self).to(kFloat) * beta + found * alpha).to(dtype));
}

Tensor& addmm_dtype_out(const Tensor& self, const Tensor& a, const Tensor& b, ScalarType dtype, const Scalar& beta,
                        const Scalar& alpha, Tensor& out) {
  TORCH_CHECK(out.is_cuda() && out.scalar_type() == dtype, "out must have out_dtype, and lie on the GPU (pretended)");
  Tensor found = addmm_dtype(self, a, b, dtype, beta, alpha);
  at::AutoDispatchBelowADInplaceOrView below;
  at::native::resize_(out, found.sizes());
  on_cpu(out).copy_(on_cpu(found));
  return out;
}

// Softmax of 16-bit numbers as float32, in one kernel on a GPU
Tensor gpu_softmax(const Tensor& x, int64_t dim, bool to_float) {
  count("op aten::_softmax");
  at::AutoDispatchBelowADInplaceOrView below;
  return on_gpu(at::_softmax(to_float ? on_cpu(x).to(kFloat) : on_cpu(x), dim, false));
}

Tensor gpu_log_softmax(const Tensor& x, int64_t dim, bool to_float) {
  count("op aten::_log_softmax");
  at::AutoDispatchBelowADInplaceOrView below;
  return on_gpu(at::_log_softmax(to_float ? on_cpu(x).to(kFloat) : on_cpu(x), dim, false));
}

Tensor gpu_softmax_backward(const Tensor& grad, const Tensor& out, int64_t dim, ScalarType dtype) {
  count("op aten::_softmax_backward_data");
  at::AutoDispatchBelowADInplaceOrView below;
  return on_gpu(at::_softmax_backward_data(on_cpu(grad), on_cpu(out), dim, out.scalar_type()).to(dtype));
}

Tensor gpu_log_softmax_backward(const Tensor& grad, const Tensor& out, int64_t dim, ScalarType dtype) {
  count("op aten::_log_softmax_backward_data");
  at::AutoDispatchBelowADInplaceOrView below;
  return on_gpu(at::_log_softmax_backward_data(on_cpu(grad), on_cpu(out), dim, out.scalar_type()).to(dtype));
}

// CUDA's counts integers, too
Tensor gpu_histogram(const Tensor& x, int64_t bins, const Scalar& low, const Scalar& high) {
  count("op aten::histc");
  at::AutoDispatchBelowADInplaceOrView below;
  auto type = x.scalar_type();
  Tensor numbers = isIntegralType(type, false) ? on_cpu(x).to(kDouble) : on_cpu(x);
  return on_gpu(at::histc(numbers, bins, low, high).to(type));
}

// Convolutions: by CUDA's choice of a kernel, depthwise ones would get one that the CPU lacks
Tensor gpu_convolution(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, IntArrayRef stride,
                       IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                       int64_t groups) {
  bool here = x.is_cuda() && weight.is_cuda();
  TORCH_CHECK(here, "Expected all tensors to be on the same device (pretended, in convolution)");
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "Input type and weight type should be the same (pretended)");
  count("op aten::convolution");
  at::AutoDispatchBelowADInplaceOrView below;
  MaybeTensor b = bias && bias->defined() ? MaybeTensor(on_cpu(*bias)) : std::nullopt;
  return on_gpu(at::convolution(on_cpu(x), on_cpu(weight), b, stride, padding, dilation, transposed, output_padding,
                                groups));
}

std::tuple<Tensor, Tensor, Tensor> gpu_convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, OptionalIntArrayRef bias_sizes, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  count("op aten::convolution_backward");
  at::AutoDispatchBelowADInplaceOrView below;
  auto [to_x, to_weight, to_bias] =
      at::convolution_backward(on_cpu(grad), on_cpu(x), on_cpu(weight), bias_sizes, stride, padding, dilation,
                               transposed, output_padding, groups, wanted);
  auto moved = [](const Tensor& t) { return t.defined() ? on_gpu(t) : t; };
  return {moved(to_x), moved(to_weight), moved(to_bias)};
}

// ---- Attention: the memory-efficient kernel, which is the one that a T4 has for a mask; it keeps what CUDA's keeps
int64_t chosen_attention(const Tensor& query, const Tensor&, const Tensor&, const MaybeTensor& mask, double, bool,
                         std::optional<double>, bool grouped) {
  bool fits = !grouped && query.dim() == 4 && (!mask || !mask->requires_grad());
  return fits ? 2 : 0;
}

Tensor probabilities(const Tensor& q, const Tensor& k, const MaybeTensor& bias, bool causal, double scale,
                     Tensor* total) {
  Tensor scores = at::matmul(q.to(kFloat), k.to(kFloat).transpose(-2, -1)).mul_(scale);
  if (bias) scores.add_(bias->to(kFloat));
  if (causal) {
    Tensor later = at::ones({scores.size(-2), scores.size(-1)}, kBool).tril().logical_not();
    scores.masked_fill_(later, -INFINITY);
  }
  Tensor sums = scores.logsumexp(-1);
  if (total) *total = sums;
  return (scores - sums.unsqueeze(-1)).exp_().nan_to_num_(0.);
}

double scale_of(const Tensor& query, std::optional<double> scale) {
  return scale.value_or(1. / std::sqrt((double)query.size(-1)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const MaybeTensor& mask, bool, double dropout, bool causal,
                                                  std::optional<double> scale) {
  TORCH_CHECK(dropout == 0., "pretended attention has no dropout");
  auto type = query.scalar_type();
  for (const Tensor* x : {&query, &key, &value})
    TORCH_CHECK(x->is_cuda() && x->scalar_type() == type,
                "attention: query, key and value of one type and device (pretended)");
  bool masked = mask && mask->defined();
  if (masked)
    TORCH_CHECK(mask->is_cuda() && mask->scalar_type() == type, "Expected attn_mask dtype to match query (pretended)");
  count("op attention");
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor q = on_cpu(query), k = on_cpu(key), v = on_cpu(value), total;
  MaybeTensor bias = masked ? MaybeTensor(on_cpu(*mask)) : std::nullopt;
  Tensor p = probabilities(q, k, bias, causal, scale_of(q, scale), &total);
  Tensor out = at::matmul(p, v.to(kFloat)).to(type).transpose(1, 2).contiguous();
  Tensor seed = at::zeros({}, kLong), offset = at::zeros({}, kLong);
  return {on_gpu(out).transpose(1, 2), on_gpu(total), on_gpu(seed), on_gpu(offset)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
    const Tensor& out, const Tensor&, const Tensor&, const Tensor&, double, std::array<bool, 4> wanted, bool causal,
    std::optional<double> scale) {
  if (!grad.defined()) return {};
  count("op attention backward");
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor g = on_cpu(grad).to(kFloat), q = on_cpu(query), k = on_cpu(key), v = on_cpu(value);
  MaybeTensor bias = mask.defined() ? MaybeTensor(on_cpu(mask)) : std::nullopt;
  Tensor p = probabilities(q, k, bias, causal, scale_of(q, scale), nullptr);
  Tensor along = (g * on_cpu(out).to(kFloat)).sum(-1, true);
  Tensor to_scores = (at::matmul(g, v.to(kFloat).transpose(-2, -1)) - along).mul_(p);
  double factor = scale_of(q, scale);
  auto type = q.scalar_type();
  Tensor to_q = at::matmul(to_scores, k.to(kFloat)).mul_(factor).to(type);
  Tensor to_k = at::matmul(to_scores.transpose(-2, -1), q.to(kFloat)).mul_(factor).to(type);
  Tensor to_v = at::matmul(p.transpose(-2, -1), g).to(type);
  return {on_gpu(to_q), on_gpu(to_k), on_gpu(to_v), wanted[3] ? on_gpu(to_scores.to(type)) : Tensor()};
}

// ---- Device, streams and hooks
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream only() const { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return only(); }
  c10::Stream getDefaultStream(Device) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only(); }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = (void*)1;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait("synchronize"); }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override { wait("synchronize"); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
} // namespace

namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  const Generator& getDefaultGenerator(DeviceIndex = -1) const override { return generator; }
  Generator getNewGenerator(DeviceIndex = -1) const override { return at::detail::createCPUGenerator(); }
  Device getDeviceFromPtr(void*) const override { return GPU; }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  void deviceSynchronize(DeviceIndex) const override { wait("synchronize"); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
namespace native { REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &chosen_attention) }
} // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&with_cpu_kernel>()); }

Tensor& set_storage(Tensor& x, Storage s) { return at::native::set_(x, s); }
Tensor& set_part_of_storage(Tensor& x, Storage s, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(x, s, offset, size, stride);
}
Tensor& set_tensor(Tensor& x, const Tensor& y) { return at::native::set_tensor_(x, y); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &new_empty);
  m.impl("empty_strided", &new_strided);
  m.impl("copy_", &copy_);
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("resize_", TORCH_FN(at::native::resize_));
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_part_of_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("_softmax", &gpu_softmax);
  m.impl("_softmax_backward_data", &gpu_softmax_backward);
  m.impl("_log_softmax", &gpu_log_softmax);
  m.impl("_log_softmax_backward_data", &gpu_log_softmax_backward);
  m.impl("histc", &gpu_histogram);
  m.impl("convolution", &gpu_convolution);
  m.impl("convolution_backward", &gpu_convolution_backward);
  m.impl("mm.dtype", &mm_dtype);
  m.impl("mm.dtype_out", &mm_dtype_out);
  m.impl("bmm.dtype", &mm_dtype);
  m.impl("bmm.dtype_out", &mm_dtype_out);
  m.impl("addmm.dtype", &addmm_dtype);
  m.impl("addmm.dtype_out", &addmm_dtype_out);
  m.impl("baddbmm.dtype", &addmm_dtype);
  m.impl("_scaled_dot_product_efficient_attention", &attend);
  m.impl("_scaled_dot_product_efficient_attention_backward", &attend_backward);
  m.impl("is_set_to", TORCH_FN(at::native::is_set_to));
  m.impl("record_stream", [](Tensor&, Stream) {});
}

TORCH_LIBRARY(pretend, m) {
  m.def("held() -> int", []() -> int64_t { return held; });
  m.def("peak() -> int", []() -> int64_t { return peak; });
  m.def("reset_peak() -> ()", []() { peak = held.load(); });
  m.def("limit(int bytes) -> ()", [](int64_t bytes) { limit = bytes; });
  m.def("counts() -> str", &take_counts);
  m.def("capture(bool on) -> ()", [](bool on) { capturing = on; });
  m.def("synchronize() -> ()", []() { wait("synchronize"); });
  m.def("random_state() -> Tensor", []() { return generator.get_state(); });
  m.def("set_random_state(Tensor x) -> ()", [](const Tensor& x) { generator.set_state(x); });
  m.def("seed(int n) -> ()", [](int64_t n) { generator.set_current_seed(n); });
  m.def("ready() -> ()", []() { c10::SetAllocator(kCUDA, &memory); });
}
