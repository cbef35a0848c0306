# libdeep_ep_simt.so: the sources of libdeep_ep_cuda.so compiled by the C++ compiler on the tests' emulation of a GPU
# (tests/simt/), and the emulation's own tests. A test instrument: it is not packaged.
file(GLOB simt_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp tests/simt/*.cpp)
file(GLOB simt_tests CONFIGURE_DEPENDS tests/simt/test_*.cpp)
list(FILTER simt_sources EXCLUDE REGEX "/tests/simt/test_[^/]*$")
list(FILTER simt_sources EXCLUDE REGEX "/csrc/cuda/device[a-z_]*\\.cpp$") # tests/simt/device.cpp stands for it

file(GLOB kernel_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
set_source_files_properties(${kernel_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")

add_library(deep_ep_emulated OBJECT ${simt_sources})
target_compile_definitions(deep_ep_emulated PUBLIC DEEP_EP_SIMT)
target_include_directories(deep_ep_emulated PUBLIC ${CMAKE_CURRENT_SOURCE_DIR}/tests)
# nvcc's `#pragma unroll`; and what the optimizer thinks of registers that are loaded and stored under one condition, and
# of devices' memory that tests make of plain numbers.
target_compile_options(deep_ep_emulated PUBLIC
  -Wno-unknown-pragmas -Wno-uninitialized -Wno-maybe-uninitialized -Wno-stringop-overflow -Wno-array-bounds)
target_link_libraries(deep_ep_emulated PUBLIC deep_ep_options ${CMAKE_DL_LIBS})

add_library(deep_ep_simt SHARED)
target_link_libraries(deep_ep_simt PRIVATE deep_ep_emulated deep_ep_protocol)
deep_ep_export_abi(deep_ep_simt)
set_target_properties(deep_ep_emulated PROPERTIES CXX_VISIBILITY_PRESET default)

enable_testing()
add_custom_target(deep_ep_simt_tests)
foreach(source IN LISTS simt_tests)
  get_filename_component(name ${source} NAME_WE)
  add_executable(simt_${name} ${source})
  target_link_libraries(simt_${name} PRIVATE deep_ep_emulated deep_ep_protocol)
  add_dependencies(deep_ep_simt_tests simt_${name})
  add_test(NAME simt_${name} COMMAND simt_${name})
  set_tests_properties(simt_${name} PROPERTIES TIMEOUT 120)
endforeach()
