// Tells the C++ code of a CPU build of torch that this machine has 8 GPUs. It can then make tensors without storage on them and
// run autograd on them. The device guard remembers the current device and does nothing else. Load this library after
// libtorch_cpu and before `import torch`, because torch asks for its CUDA hooks only once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kGpus = 8;
thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device device(c10::DeviceIndex index) {
    return {c10::DeviceType::CUDA, index};
  }
  c10::Device getDevice() const override {
    return device(current);
  }
  c10::Device exchangeDevice(c10::Device next) const override {
    const auto before = current;
    current = next.index();
    return device(before);
  }
  void setDevice(c10::Device next) const override {
    current = next.index();
  }
  void uncheckedSetDevice(c10::Device next) const noexcept override {
    current = next.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kGpus;
  }
  c10::Stream getStream(c10::Device where) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, where);
  }
  c10::Stream getDefaultStream(c10::Device where) const override {
    return c10::Stream(c10::Stream::DEFAULT, where);
  }
};

} // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {

// torch looks it up by this name.

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasCUDA() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return false;
  }
  DeviceIndex deviceCount() const override {
    return kGpus;
  }
  DeviceIndex getCurrentDevice() const override {
    return current;
  }
  int getNumGPUs() const override {
    return kGpus;
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

} // namespace at
