// Runs a program that AOTInductor compiled, without Python: `libtorch_program OPERATORS PROGRAM IMAGE OUTPUT` loads the
// library of the operators, reads an image [1, 3, 24, 32] of float32, and writes the numbers of all outputs.
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>

int main(int, char** arguments) {
  if (!dlopen(arguments[1], RTLD_NOW)) return std::cerr << dlerror() << "\n", 1;
  at::Tensor image = at::empty({1, 3, 24, 32});
  std::ifstream(arguments[3], std::ios::binary).read(static_cast<char*>(image.data_ptr()), image.nbytes());
  torch::inductor::AOTIModelPackageLoader program(arguments[2]);
  std::ofstream file(arguments[4], std::ios::binary);
  for (const at::Tensor& output : program.run({image}))
    file.write(static_cast<const char*>(output.contiguous().data_ptr()), output.nbytes());
}
