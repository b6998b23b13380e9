// Runs an artifact of the target tvm from C++: model.so, params.safetensors and model.json, with TVM's runtime alone.
//
//   tvm_run FOLDER INPUT.bin ...
//
// Each INPUT.bin holds one input of the model, in the order of model.json's "inputs": raw little-endian elements in C
// order, as NumPy's tofile writes them. The number of samples must be one of model.json's "batches". Every output is
// printed as a line of name, type and shape, and a line of values. Exit code 2: the input or the artifact is wrong; 3:
// this processor lacks features that the artifact was built for, which are named before any of its code runs.
//
// docs/tvm.md has the line that compiles it. It uses the headers of tvm_ffi only, JSON parser included; libtvm_runtime
// is loaded for the virtual machine that it registers.

#include <tvm/ffi/tvm_ffi.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
using Json = ffi::json::Object;
using List = ffi::json::Array;

struct WrongInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct WrongProcessor : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw WrongInput(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

Json ParseObject(const std::string& text, const std::string& path) {
  ffi::String problem;
  ffi::Any parsed = ffi::json::Parse(text, &problem);
  if (!problem.empty() || !parsed.as<Json>()) throw WrongInput(path + ": no JSON object");
  return parsed.cast<Json>();
}

template <typename T>
T Key(const Json& object, const char* key, const std::string& path) {
  if (!object.count(ffi::String(key))) throw WrongInput(path + ": no key " + key);
  return object[ffi::String(key)].cast<T>();
}

// A shared library that was cut short would end the process where it is loaded, with a bus error.
void RequireWhole(const std::string& folder, const Json& sizes) {
  for (const auto& [key, size] : sizes) {
    std::string path = folder + "/" + std::string(key.cast<ffi::String>());
    size_t found = ReadFile(path).size();
    if (found != static_cast<size_t>(size.cast<int64_t>())) {
      throw WrongInput(path + ": truncated or changed: " + std::to_string(found) + " bytes");
    }
  }
}

// Memory of a tensor, aligned as TVM's own.
struct Aligned {
  void AllocData(DLTensor* tensor) {
    size_t bytes = (ffi::GetDataSize(*tensor) + 63) / 64 * 64;
    tensor->data = std::aligned_alloc(64, bytes == 0 ? 64 : bytes);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor MakeTensor(const std::string& dtype, const std::vector<int64_t>& shape, const char* data, size_t bytes,
                       const std::string& name) {
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Aligned(), ffi::Shape(shape.begin(), shape.end()),
                                                ffi::StringToDLDataType(dtype), DLDevice{kDLCPU, 0});
  size_t wanted = ffi::GetDataSize(*tensor.GetDLTensorPtr());
  if (wanted != bytes) {
    throw WrongInput(name + ": " + std::to_string(wanted) + " bytes expected, " + std::to_string(bytes) + " found");
  }
  std::memcpy(tensor.data_ptr(), data, bytes);
  return tensor;
}

// safetensors: 8 bytes of length, a JSON header of that length, then the data that its offsets point into.
ffi::Map<ffi::String, ffi::Tensor> ReadSafetensors(const std::string& path) {
  static const std::map<std::string, std::string> kTypes = {
      {"F32", "float32"}, {"F16", "float16"}, {"I64", "int64"}, {"I32", "int32"},
      {"I16", "int16"},   {"I8", "int8"},     {"U8", "uint8"},  {"BOOL", "bool"}};
  std::string file = ReadFile(path);
  uint64_t length = 0;
  if (file.size() < 8) throw WrongInput(path + ": truncated");
  std::memcpy(&length, file.data(), 8);
  if (length > file.size() - 8) throw WrongInput(path + ": truncated");
  const size_t start = 8 + length;
  ffi::Map<ffi::String, ffi::Tensor> tensors;
  for (const auto& [key, value] : ParseObject(file.substr(8, length), path)) {
    std::string name = key.cast<ffi::String>();
    if (name == "__metadata__") continue;
    Json about = value.cast<Json>();
    auto type = kTypes.find(about["dtype"].cast<std::string>());
    if (type == kTypes.end()) throw WrongInput(path + ": " + name + " has a type that no kernel reads");
    std::vector<int64_t> shape;
    for (const ffi::Any& d : about["shape"].cast<List>()) shape.push_back(d.cast<int64_t>());
    List offsets = about["data_offsets"].cast<List>();
    uint64_t first = offsets[0].cast<int64_t>(), last = offsets[1].cast<int64_t>();
    if (first > last || last > file.size() - start) throw WrongInput(path + ": truncated");
    tensors.Set(name, MakeTensor(type->second, shape, file.data() + start + first, last - first, name));
  }
  return tensors;
}

// Refuses, by name, before an illegal instruction would end the process. Where /proc does not exist nothing is checked.
void RequireFeatures(const List& required) {
  std::ifstream file("/proc/cpuinfo");
  std::set<std::string> offered;
  for (std::string line; std::getline(file, line) && !line.empty();) {
    if (line.rfind("flags", 0) == 0 || line.rfind("Features", 0) == 0) {
      std::istringstream words(line.substr(line.find(':') + 1));
      for (std::string word; words >> word;) offered.insert(word);
    }
  }
  std::string missing;
  for (const ffi::Any& feature : required) {
    std::string name = feature.cast<ffi::String>();
    if (!offered.empty() && !offered.count(name)) missing += (missing.empty() ? "" : ", ") + name;
  }
  if (!missing.empty()) throw WrongProcessor("built for features that this processor lacks: " + missing);
}

template <typename T>
void PrintValues(const ffi::Tensor& tensor, const char* format) {
  const T* values = static_cast<const T*>(tensor.data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) std::printf(format, i ? " " : "", values[i]);
  std::printf("\n");
}

void Print(const std::string& name, const ffi::Tensor& tensor) {
  std::string dtype = ffi::DLDataTypeToString(tensor.dtype());
  std::printf("%s %s", name.c_str(), dtype.c_str());
  for (int64_t d : tensor.shape()) std::printf(" %lld", static_cast<long long>(d));
  std::printf("\n");
  if (dtype == "float32") {
    PrintValues<float>(tensor, "%s%.9g");  // nine digits give every float32 back
  } else if (dtype == "int64") {
    PrintValues<long long>(tensor, "%s%lld");
  } else {
    throw WrongInput("output " + name + " is " + dtype + ": add its type here");
  }
}

void Run(const std::string& folder, const std::vector<std::string>& files) {
  const std::string description = folder + "/model.json";
  Json about = ParseObject(ReadFile(description), description);
  RequireWhole(folder, Key<Json>(about, "size_bytes", description));
  if (about.count("compute_capability")) {
    std::string capability = about["compute_capability"].cast<ffi::String>();
    throw WrongProcessor("built for CUDA, compute capability " + capability + ": this program runs what was built for a CPU");
  }
  RequireFeatures(Key<List>(about, "features", description));

  // Inputs. -1 is the batch dimension; the size of the first file says how many samples there are.
  List inputs = Key<List>(about, "inputs", description);
  if (files.size() != inputs.size()) {
    throw WrongInput(std::to_string(inputs.size()) + " inputs expected, " + std::to_string(files.size()) + " given");
  }
  std::vector<ffi::Any> arguments;
  int64_t batch = -1;
  for (size_t i = 0; i < files.size(); ++i) {
    Json input = inputs[i].cast<Json>();
    std::string data = ReadFile(files[i]), dtype = input["dtype"].cast<std::string>();
    int64_t sample = ffi::GetDataSize(1, ffi::StringToDLDataType(dtype));
    std::vector<int64_t> shape;
    for (const ffi::Any& d : input["shape"].cast<List>()) {
      shape.push_back(d.cast<int64_t>());
      if (shape.back() > 0) sample *= shape.back();
    }
    if (batch < 0) batch = static_cast<int64_t>(data.size()) / sample;
    for (int64_t& d : shape) d = d < 0 ? batch : d;
    arguments.emplace_back(MakeTensor(dtype, shape, data.data(), data.size(), files[i]));
  }
  std::string entry = "run_" + std::to_string(batch), built;
  for (const ffi::Any& size : Key<List>(about, "batches", description)) {
    built += (built.empty() ? "" : ", ") + std::to_string(size.cast<int64_t>());
  }
  Json functions = Key<Json>(about, "functions", description);
  if (!functions.count(ffi::String(entry))) {
    throw WrongInput(files[0] + ": " + std::to_string(batch) + " samples, but the artifact was built for " + built);
  }

  // The virtual machine: one device (type 1 is the CPU, its number 0), pooled memory (2).
  ffi::Module library = ffi::Module::LoadFromFile(folder + "/model.so");
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  machine->GetFunction("vm_initialization").value()(1, 0, 2);

  auto stored = ReadSafetensors(folder + "/params.safetensors");
  ffi::Array<ffi::Any> parameters;
  for (const ffi::Any& name : functions[ffi::String(entry)].cast<Json>()["parameters"].cast<List>()) {
    parameters.push_back(stored.at(name.cast<ffi::String>()));
  }
  arguments.emplace_back(parameters);

  ffi::Any result;
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  machine->GetFunction(entry).value().CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  auto outputs = result.cast<ffi::Array<ffi::Tensor>>();
  List names = Key<List>(about, "outputs", description);
  for (size_t i = 0; i < outputs.size(); ++i) Print(names[i].cast<ffi::String>(), outputs[i]);
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: tvm_run FOLDER INPUT.bin ...\n";
    return 2;
  }
  try {
    Run(argv[1], {argv + 2, argv + argc});
  } catch (const WrongProcessor& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 3;
  } catch (const ffi::Error& error) {  // TVM's own: the library cannot be loaded, a key is missing
    std::cerr << "error: " << error.message() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
  return 0;
}
